"""The known-good judge of replies, for evaluation and for looks during PPO: a rule, or any other signal.

What serves as gold serves as reward and the other way round, as both are signals (`align/rl/signals/`); only reward
models of this project are none, since they have a role in the stage itself. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from align.rl.signals.base import Said, Signal, Site, Verdict, signal_of
from data_prep.core.errors import UserError

if TYPE_CHECKING:
    from align.inference.generation import Reply
    from align.training.context import StageContext
    from data_prep.options import DataOptions
    from data_prep.types import PromptTokens

Gold = Callable[[Sequence["PromptTokens"], Sequence[str], Sequence["Reply"]], list[Verdict]]
"""Prompts, replies as text, replies -> the gold verdict on each."""
_RULE, _SIGNAL = "data.gold.options", "data.gold.signal"


def gold_signal(data: DataOptions) -> Signal | None:
    """The signal that the data names as gold; None where it names none.

    Raises:
        UserError: it cannot be, or there are two.
    """
    given = data.gold
    if not given.signal:
        return None if given.rule is None else signal_of({"rule": given.rule}, _RULE)
    if given.rule is not None:
        raise UserError(
            "a rule and a signal: one of them is gold", field=_SIGNAL, code="bad_value", hint="leave one out"
        )
    found = signal_of(given.signal, _SIGNAL)
    if found.source.models:
        raise UserError(
            "a reward model of a run is no gold",
            field=_SIGNAL,
            code="bad_value",
            hint="evaluate reports it anyway: stages.evaluate.reward=RUN/reward_model",
        )
    return found


def gold_refusals(data: DataOptions) -> Iterator[UserError]:
    """Why what the data names as gold, if anything, cannot judge."""
    try:
        if (gold := gold_signal(data)) is not None:
            gold.source.check(gold.where, data)
    except UserError as problem:
        yield problem


def gold_judge(context: StageContext) -> Gold | None:
    """The gold verdict on every reply, where the data names a judge."""
    from align.training.processes import as_one

    data = context.spec.data
    if (gold := gold_signal(data)) is None:
        return None
    with as_one(context.accelerator):
        scorer = gold.source.open(gold.where, Site(data, context.accelerator.device, context.config.allow_code))

    def verdicts(rows: Sequence[PromptTokens], texts: Sequence[str], replies: Sequence[Reply]) -> list[Verdict]:
        return scorer(Said(rows, texts, [reply.finished for reply in replies]))

    return verdicts
