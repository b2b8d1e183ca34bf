"""DPO: learn from preference pairs without a reward model.

"Direct Preference Optimization: Your Language Model is Secretly a Reward Model", arXiv 2305.18290, eq. 7, and ten
other losses of pairs (`align/training/dpo.py` has the formulas). Differs from common implementations in that policy
and reference are adapters on one base held once in memory, by any method; that both are compared before the first
step; that a pair's prompt is computed once; and that the reference is always the function the policy starts from,
never the bare base under it. Costs one forward and backward of the policy and one forward of the reference over
prompt + both replies per pair and epoch. `docs/preference.md` has the options.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

from align.stages.base import stage
from align.stages.preference import PreferenceStage
from data_prep.core.errors import UserError
from data_prep.core.options import option

if TYPE_CHECKING:
    from align.adapters.base import Adapter
    from align.checkpoints.compatibility import ParentInfo
    from align.roles import Role
    from align.training.context import StageContext
    from align.training.objectives import Objective


class PairLoss(Enum):
    """Losses of preference pairs; formulas in `align/training/dpo.py`."""

    sigmoid = "sigmoid"
    hinge = "hinge"
    ipo = "ipo"
    robust = "robust"
    exo_pair = "exo_pair"
    nca_pair = "nca_pair"
    bco_pair = "bco_pair"
    sppo_hard = "sppo_hard"
    apo_zero = "apo_zero"
    apo_down = "apo_down"
    sigmoid_norm = "sigmoid_norm"


NOISY = (PairLoss.sigmoid, PairLoss.robust, PairLoss.exo_pair)
"""Losses that know of wrong labels."""


@stage("dpo")
@dataclass
class DPO(PreferenceStage):
    """Learn from preference pairs directly, held near the parent."""

    needs_data: ClassVar[tuple[str, ...]] = ("preferences",)

    loss_type: PairLoss = option(
        PairLoss.sigmoid,
        "sigmoid|hinge|ipo|robust|exo_pair|nca_pair|bco_pair|sppo_hard|apo_zero|apo_down|sigmoid_norm",
    )
    beta: float = option(0.1, "how strongly the policy is held near its reference", above=0)
    label_smoothing: float = option(0.0, "share of wrong labels, for sigmoid, robust and exo_pair", below=0.5)
    sft_weight: float = option(0.0, "weight of the chosen reply's negative log-likelihood by token", low=0)

    def objective(self, context: StageContext, role: Role) -> Objective:
        """The loss of pairs, against the function that the policy starts from."""
        from align.training.dpo import DirectPreference

        reference = context.start_role("reference").silence_dropout()
        objective = DirectPreference(role, reference, self.loss_type.value, self.beta, self.label_smoothing)
        objective.sft_weight = self.sft_weight
        return objective

    def refusals(self, where: str, adapter: Adapter, reward: ParentInfo | None) -> Iterator[UserError]:
        """Label noise where the loss has no use for it, or none where it needs some."""
        yield from super().refusals(where, adapter, reward)
        name, field = self.loss_type.value, f"{where}.label_smoothing"
        if self.label_smoothing and self.loss_type not in NOISY:
            noisy = ", ".join(loss.value for loss in NOISY)
            said, hint = f"loss_type={name} has no label smoothing", f"leave it out, or take one of {noisy}"
            yield UserError(said, field=field, code="no_effect", hint=hint)
        if not self.label_smoothing and self.loss_type is PairLoss.exo_pair:
            said = f"loss_type={name} needs a share of wrong labels above 0"
            yield UserError(said, field=field, code="bad_value", hint=f"set {field}=0.001")
