"""Learning-rate range test: one short run whose learning rate rises until training diverges.

"Cyclical Learning Rates for Training Neural Networks", arXiv 1506.01186, section 3.3; here for SFT, with whatever
adapter is chosen, from a rate far below the method's usual one to far above it. What it trained is thrown away: it
leaves `result.json` with rates, losses and a suggestion. Costs as many SFT steps as it takes (100).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from align.stages.base import stage
from align.stages.sft import SFT
from data_prep.core.errors import UserError
from data_prep.core.options import option

if TYPE_CHECKING:
    from align.adapters.base import Adapter
    from align.checkpoints.checkpoint import Checkpoint
    from align.checkpoints.compatibility import ParentInfo
    from align.training.context import StageContext
    from align.training.lr_range import Finding
    from data_prep.prepare.prepare import Prepared


@stage("lr_range")
@dataclass
class LRRange(SFT):
    """Find a learning rate for SFT: raise it step by step and watch the loss."""

    makes: ClassVar[str | None] = None

    max_steps: int = option(100, "steps from the lowest rate to the highest", low=2)
    low: float = option(0.01, "lowest rate, as a multiple of the usual one (or of lr)", above=0)
    high: float = option(100.0, "highest rate, as a multiple of the usual one (or of lr)", above=0)
    diverged: float = option(2.0, "stop when the loss is above this many times its lowest", above=1)

    def refusals(self, where: str, adapter: Adapter, reward: ParentInfo | None) -> Iterator[UserError]:
        """The rate has to rise."""
        yield from super().refusals(where, adapter, reward)
        if self.low >= self.high:
            yield UserError(f"must be below {where}.high (got {self.low:g}, {self.high:g})", field=f"{where}.low")

    def run(self, context: StageContext) -> Checkpoint | None:
        """Train a throw-away role at rising rates; write result.json."""
        from align.stages.supervised import groups_of, hooks_of, record_counts
        from align.training.lr_range import RisingUpdater, finding, range_test
        from align.training.optimizer import ready_to_train
        from align.training.regularisers import regularise
        from data_prep.core.progress import Progress

        with context.phase("data"):
            prepared: Prepared[Any] = context.rows(self.needs_data[0])
        context.write_card(prepared)
        role = context.fresh_role("policy")
        ready_to_train(role, self)
        groups = groups_of(role, context.lr * self.high, self)
        steps = self.max_steps
        objective = self.objective(context, role)
        regularise(objective, role, self, lambda: context.bases.start_of(context.init, context.parent_mode, "start"))
        updater = RisingUpdater(objective, groups, self, steps, context.accelerator, hooks_of(role))
        updater.share = self.low / self.high
        record_counts(context, role)
        with Progress(context.spec.name, steps, enabled=context.is_main) as progress, context.phase("train"):

            def log(step: int, split: str, numbers: dict[str, float]) -> None:
                if context.is_main:
                    context.metrics.log(step, split, numbers)
                progress.advance(1, loss=numbers["loss"], lr=numbers["lr"])

            rates, losses = range_test(updater, prepared.train, context.seed, self.diverged, log)
        found = finding(rates, losses, steps)
        context.numbers["metrics"] = {"lowest_lr": found.lowest, "steps": len(losses)}
        if found.suggestion is not None:
            context.numbers["metrics"]["suggestion"] = found.suggestion
        if context.is_main:
            result = {"lrs": rates, "losses": losses, **_told(found)}
            text = json.dumps(result, indent=1, allow_nan=False) + "\n"
            (context.staging / "result.json").write_text(text, encoding="utf-8")
        return None


def _told(found: Finding) -> dict[str, Any]:
    """The finding as result.json has it, with a line for people and an override to copy."""
    told: dict[str, Any] = {
        "smoothed": found.smoothed,
        "lowest_lr": found.lowest,
        "suggestion": found.suggestion,
        "diverged": found.diverged,
        "rule": "a tenth of the rate at which training diverged",
    }
    if found.suggestion is None:
        headline = "No rate lowered the loss by more than its noise: try more steps or larger batches."
        return {**told, "headline": headline}
    mantissa, _, exponent = f"{found.suggestion:.1e}".partition("e")
    rate = f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    where = "the one at which training diverged"
    if not found.diverged:
        where = "the highest tried, where training had not diverged yet: stages.lr_range.high may be raised"
    headline = f"Suggested learning rate: {rate}, a tenth of {where}."
    return {**told, "headline": headline, "override": f"stages.sft.lr={rate}"}
