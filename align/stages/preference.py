"""What the stages that learn from judged replies share: roles, the check of step 0, training, saving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from align.stages.base import TrainingStage
from data_prep.core.errors import TrainingStopped
from data_prep.core.options import option
from data_prep.types import joined

if TYPE_CHECKING:
    from align.checkpoints.checkpoint import Checkpoint
    from align.roles import Role
    from align.training.context import StageContext
    from align.training.objectives import Objective

TOLERANCE = 1e-5
"""Largest log ratio of a reply, in nats, that policy and reference may have before the first step."""


@dataclass
class PreferenceStage(TrainingStage):
    """A policy trained on judged replies, most often beside the frozen function that it starts from.

    Dropout is off in the policy, as in PPO: else it would differ from its reference by noise.
    """

    makes: ClassVar[str | None] = "policy"
    base_lr: ClassVar[float] = 2e-5

    epochs: float = option(1.0, "passes over the training rows", above=0)

    def reply(self, row: Any) -> list[int]:
        """A reply of a row, for the checkpoint's probe."""
        return row.chosen  # type: ignore[no-any-return]

    def run(self, context: StageContext) -> Checkpoint | None:
        """Stand the policy and what it is measured against on one base, train, and save the policy."""
        from align.models.shared_base import storages
        from align.stages.supervised import save_policy, supervised_run

        with context.phase("data"):
            prepared = self.rows(context)
        context.write_card(prepared)
        role = context.fresh_role("policy").silence_dropout()
        objective = self.objective(context, role)
        first = prepared.train[: min(8, len(prepared.train))]
        step0 = at_start(objective, role, first)
        base = storages(each.model for each in context.bases.opened())
        final = supervised_run(context, objective, role, prepared)
        context.numbers["metrics"] = {
            **{"eval_loss" if name == "loss" else name: value for name, value in final.items()},
            "step0": step0,
            "memory": {"bases": len(context.bases.opened()), "base_bytes": sum(base.values())},
        }
        rows = (prepared.eval or prepared.train)[:8]
        return save_policy(
            context, role, [(row.id, row.prompt) for row in rows], [joined(r.prompt, self.reply(r)) for r in rows[:2]]
        )


def at_start(objective: Objective, role: Role, rows: Sequence[Any]) -> dict[str, float]:
    """The numbers of a few rows before the first step; policy and reference are one function there.

    Raises:
        TrainingStopped: they are not.
    """
    import torch

    batch = objective.collate(rows)
    objective.eval()
    with torch.no_grad():
        objective.survey([batch], lambda own: own)
        loss, numbers = objective(batch.to(role.tree.device))
    found = {"loss": float(loss) / batch.weight}
    if "max_log_ratio" in numbers:
        found["max_log_ratio"] = float(numbers["max_log_ratio"])
        if found["max_log_ratio"] > TOLERANCE:
            raise TrainingStopped(
                f"a reply's log-probabilities under policy and reference differ by {found['max_log_ratio']:.2e} nats "
                f"before the first step (at most {TOLERANCE})",
                code="unequal_start",
                hint="the policy does not start as its parent; report this with the run's recipe.yaml",
            )
    return found
