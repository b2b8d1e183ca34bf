"""Supervised fine-tuning: imitate the assistant's turns of conversations.

"Training language models to follow instructions with human feedback", arXiv 2203.02155, section 3.5 (step 1). The
loss is the mean negative log-likelihood of supervised tokens (the assistant's words and their end-of-turn token) over
the whole batch, not a mean of per-row means. Costs one forward and backward per row and epoch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from align.stages.base import TrainingStage, stage
from data_prep.core.options import option

if TYPE_CHECKING:
    from align.checkpoints.checkpoint import Checkpoint
    from align.roles import Role
    from align.training.context import StageContext
    from data_prep.prepare.prepare import Prepared
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
        from align.stages.supervised import supervised_run
        from align.training.context import write_samples
        from align.training.objectives import LanguageModeling
        from align.training.saving import Result, save_result

        with context.phase("data"):
            prepared = context.rows(self.needs_data[0])
        context.write_card(prepared)
        role = context.fresh_role("policy")
        final = supervised_run(context, LanguageModeling(role), role, prepared)
        if final:  # there were held-out rows
            tasks = {f"eval_{name}": value for name, value in final.items() if name.startswith("loss/")}
            perplexity = math.exp(min(final["loss"], 50.0))
            context.numbers["metrics"] = {"eval_loss": final["loss"], "perplexity": perplexity, **tasks}
        if context.is_main:
            with context.phase("samples"):
                write_samples(context, self.samples(context, role, prepared))
        result = Result(
            role=role,
            kind="policy",
            parents=[("init", context.init)] if context.init else [],
            probe_ids=[row.ids[:64] for row in (prepared.eval or prepared.train)[:2]],
            metrics=context.numbers.get("metrics", {}),
            on_parent=context.parent_mode.mode.name if context.parent_mode.mode else None,
        )
        return save_result(context, result, context.staging)

    def samples(self, context: StageContext, role: Role, prepared: Prepared[Tokens]) -> list[dict[str, Any]]:
        """The openings of held-out rows, and how the model goes on (greedily)."""
        from align.inference.generation import RolloutEngine, Sampling

        rows = (prepared.eval or prepared.train)[:8]
        prompts = [self.opening(row) for row in rows]
        engine = RolloutEngine(role, context.renderer.end_token_id, context.renderer.pad_token_id)
        room = (context.context or 1 << 30) - max(len(prompt) for prompt in prompts)
        replies = engine.generate(prompts, Sampling(min(64, room), greedy=True))
        decode = context.renderer.decode
        return [
            {"id": row.id, "prompt": decode(prompt), "reply": decode(reply.ids), "ended": reply.finished}
            for row, prompt, reply in zip(rows, prompts, replies, strict=True)
        ]

    def opening(self, row: Tokens) -> list[int]:
        """A conversation up to its first reply."""
        return row.ids[: row.mask.index(True)]
