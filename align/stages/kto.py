"""KTO: learn from replies that are labelled good or bad, without pairs.

"KTO: Model Alignment as Prospect Theoretic Optimization", arXiv 2402.01306, eq. 7. Reads labelled replies
({prompt, completion, label}); preference pairs are read as a good and a bad reply each. Differs from TRL's trainer in
how the reference point is estimated (`align/training/kto.py`), and as DPO does. Costs one forward and backward of
the policy, two more forwards of it and of the reference over prompt + reply per row and epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from align.stages.base import stage
from align.stages.preference import PreferenceStage
from data_prep.core.errors import UserError
from data_prep.core.options import option

if TYPE_CHECKING:
    from align.roles import Role
    from align.training.context import StageContext
    from align.training.objectives import Objective
    from data_prep.prepare.prepare import Prepared


class LabelLoss(Enum):
    """Losses of labelled replies; formulas in `align/training/kto.py`."""

    kto = "kto"
    apo_zero_unpaired = "apo_zero_unpaired"


@stage("kto")
@dataclass
class KTO(PreferenceStage):
    """Learn from replies labelled good or bad, held near the parent."""

    needs_data: ClassVar[tuple[str, ...]] = ("unpaired",)

    loss_type: LabelLoss = option(LabelLoss.kto, "kto|apo_zero_unpaired (without a reference point)")
    beta: float = option(0.1, "how strongly the policy is held near its reference", above=0)
    desirable_weight: float = option(1.0, "weight of good replies", above=0)
    undesirable_weight: float = option(1.0, "weight of bad replies", above=0)
    sft_weight: float = option(0.0, "weight of good replies' negative log-likelihood by token", low=0)

    def objective(self, context: StageContext, role: Role) -> Objective:
        """The loss of labelled replies, against the function that the policy starts from."""
        from align.training.kto import KahnemanTversky

        reference = context.start_role("reference").silence_dropout()
        weights = (self.desirable_weight, self.undesirable_weight)
        objective = KahnemanTversky(role, reference, self.loss_type.value, self.beta, *weights)
        objective.sft_weight = self.sft_weight
        return objective

    def rows(self, context: StageContext) -> Prepared[Any]:
        """Every reply beside one to another prompt."""
        from align.training.kto import Mismatched

        prepared = super().rows(context)
        for doubt in self.doubts_of_rows(prepared.train):
            context.warn(doubt.code, doubt.message, doubt.hint)
        if self.loss_type is not LabelLoss.kto:
            return prepared
        train, held = (Mismatched(rows, prepared.train) for rows in (prepared.train, prepared.eval))
        return replace(prepared, train=train, eval=held)

    def doubts_of_rows(self, rows: Sequence[Any]) -> Iterator[UserError]:
        """One label alone."""
        first = rows[0].good
        if all(row.good is first for row in rows):
            said = f"all {len(rows):,} training rows are labelled {'good' if first else 'bad'}"
            hint = "add rows of the other label: nothing says what replies should differ in"
            yield UserError(said, code="one_label", hint=hint)

    def reply(self, row: Any) -> list[int]:
        """The labelled reply."""
        return row.reply  # type: ignore[no-any-return]
