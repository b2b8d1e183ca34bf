"""Supervised fine-tuning: imitate the assistant's turns of conversations.

"Training language models to follow instructions with human feedback", arXiv 2203.02155, section 3.5 (step 1). The
loss is the mean negative log-likelihood of supervised tokens (the assistant's words and their end-of-turn token) over
the whole batch, not a mean of per-row means. Costs one forward and backward per row and epoch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from align.stages.base import TrainingStage, stage
from data_prep.core.options import option

if TYPE_CHECKING:
    from align.checkpoints.checkpoint import Checkpoint
    from align.roles import Role
    from align.training.context import StageContext
    from align.training.objectives import Objective
    from data_prep.types import Tokens


@stage("sft")
@dataclass
class SFT(TrainingStage):
    """Imitate the assistant's turns of conversations."""

    needs_data: ClassVar[tuple[str, ...]] = ("conversations",)
    makes: ClassVar[str | None] = "policy"

    epochs: float = option(3.0, "passes over the training rows", above=0)

    def run(self, context: StageContext) -> Checkpoint | None:
        """Train a policy on the prepared rows and save it."""
        from align.stages.supervised import save_policy, supervised_run

        with context.phase("data"):
            prepared = self.rows(context)
        context.write_card(prepared)
        role = context.fresh_role("policy")
        final = supervised_run(context, self.objective(context, role), role, prepared)
        if final:  # there were held-out rows
            tasks = {f"eval_{name}": value for name, value in final.items() if name.startswith("loss/")}
            perplexity = math.exp(min(final["loss"], 50.0))
            context.numbers["metrics"] = {"eval_loss": final["loss"], "perplexity": perplexity, **tasks}
        rows = prepared.eval or prepared.train
        return save_policy(context, role, [(row.id, self.opening(row)) for row in rows[:8]], [r.ids for r in rows[:2]])

    def objective(self, context: StageContext, role: Role) -> Objective:
        """Likelihood of the supervised tokens."""
        from align.training.objectives import LanguageModeling

        return LanguageModeling(role)

    def opening(self, row: Tokens) -> list[int]:
        """A conversation up to its first reply."""
        return row.ids[: row.mask.index(True)]
