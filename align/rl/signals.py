"""What a policy is rewarded for where that is more than one reward model: rules and a model, weighed and added.

    R(x, y) = sum over k of  weight_k x clip_k(normalise_k(s_k(x, y)))

`stages.ppo.reward` lists the signals. Their sum takes the place of the reward model's normalised score; clip, end
penalty, KL penalty and everything after it are the same (`reward/shaping.py`). No torch where options are read.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import TYPE_CHECKING, Any

from data_prep.core.errors import UserError
from data_prep.core.options import build, option
from reward.rules import Rule, rules, verdict

if TYPE_CHECKING:
    from torch import Tensor

    from align.inference.generation import Reply
    from data_prep.types import PromptTokens

MODEL = "reward_model"
"""Name of the reward model's signal where none is given."""
_FLAT = 1e-6
"""Scores with a smaller deviation have none to be divided by."""


class Normalise(Enum):
    """How a signal's scores are brought to a common scale."""

    auto = "auto"
    none = "none"
    start = "start"
    running = "running"


@dataclass
class SignalOptions:
    """What can be set of one signal, beside the options of its rule."""

    rule: str | None = option(None, "rule that scores replies, one of reward/rules/; its options stand beside it")
    checkpoint: str | None = option(None, "reward model in its place: a stage, RUN/STAGE or a path; one at most")
    name: str | None = option(None, "its name in metrics (default: the rule's, or reward_model)")
    weight: float = option(1.0, "its weight in the sum; below 0 it is a penalty, 0 only logs it", low=-1e6, high=1e6)
    normalise: Normalise = option(
        Normalise.auto,
        "auto|none|start|running: by mean and deviation of the starting policy's replies, or of all so far; auto: a "
        "reward model by its own, a rule not at all",
    )
    clip: float = option(0.0, "bound of the normalised score on both sides (0: none)")


@dataclass(frozen=True)
class Signal:
    """One signal as it was set."""

    name: str
    where: str
    """Dotted path of its options."""
    given: SignalOptions
    options: dict[str, Any]
    """Those of its rule."""

    @property
    def measured(self) -> bool:
        """Whether the starting policy's replies are scored to normalise it."""
        return self.given.normalise in (Normalise.start, Normalise.running)


def signals_of(value: Any, where: str) -> list[Signal]:
    """The signals that a stage's `reward` lists; none where it names a checkpoint, or nothing.

    Raises:
        UserError: no signals, an option that there is not, or two of one name.
    """
    if value is None or isinstance(value, str):
        return []
    listed = value if isinstance(value, list) else [value]
    places = [f"{where}[{i}]" for i in range(len(listed))] if isinstance(value, list) else [where]
    found = [_signal(each, place) for each, place in zip(listed, places, strict=True)]
    if not found:
        raise UserError("an empty list rewards nothing", field=where, code="bad_value", hint="name a rule")
    names = [each.name for each in found]
    for each in found:
        if names.count(each.name) > 1:
            raise UserError(
                f"two signals are called {each.name}", field=each.where, code="bad_value", hint="give one a name=NAME"
            )
    if sum(each.given.checkpoint is not None for each in found) > 1:
        raise UserError("more than one reward model", field=where, code="bad_value", hint="leave all but one out")
    return found


def _signal(value: Any, where: str) -> Signal:
    """One signal; what is none of its options is one of its rule."""
    value = {"checkpoint": value} if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        raise UserError(f"expected a signal {{rule: NAME}} (got {value})", field=where, code="bad_value")
    own = {each.name for each in fields(SignalOptions)}
    given = build(SignalOptions, {key: each for key, each in value.items() if key in own}, where)
    options = {str(key): each for key, each in value.items() if key not in own}
    if (given.rule is None) == (given.checkpoint is None):
        raise UserError(
            "a signal is a rule or a reward model",
            field=where,
            code="bad_value",
            hint=f"give it rule=NAME (one of {', '.join(rules.names())}) or checkpoint=RUN/reward_model",
        )
    if given.rule is None and options:
        raise UserError(
            f"a reward model has no option {next(iter(options))}", field=where, code="unknown_key", hint="leave it out"
        )
    name = given.name or given.rule or MODEL
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"not a name (got {name!r})", field=f"{where}.name", code="bad_value")
    return Signal(name, where, given, options)


class Signals:
    """The signals of a stage at work.

    Args:
        built: the rules, by name of their signals.
        decode: a reply's token ids -> its text.
        model_norm: mean and deviation of the reward model's scores, where it is a signal.
    """

    def __init__(
        self,
        signals: Sequence[Signal],
        built: Mapping[str, Rule],
        decode: Callable[[list[int]], str],
        model_norm: Mapping[str, float] | None = None,
    ) -> None:
        self._signals = signals
        self._built = built
        self._decode = decode
        self._model_norm = model_norm
        self._start: dict[str, list[float]] = {}
        self._sums: dict[str, list[float]] = {}

    @property
    def measured(self) -> bool:
        """Whether scores of the starting policy's replies are needed first (`begin`)."""
        return any(each.measured for each in self._signals)

    def scores(self, prompts: Sequence[PromptTokens], replies: Sequence[Reply], model_B: Tensor) -> dict[str, Tensor]:
        """What each signal says of every reply, by name, [B] in float32; `model_B` are the reward model's scores.

        Raises:
            UserError, TrainingStopped: as `verdict` of reward/rules.
        """
        import torch

        texts = [self._decode(list(reply.ids)) for reply in replies] if self._built else []
        found = {}
        for each in self._signals:
            if each.given.rule is None:
                found[each.name] = model_B.float()
                continue
            rule, said = self._built[each.name], zip(prompts, texts, replies, strict=True)
            verdicts = [verdict(each.given.rule, rule, row, text, reply.finished) for row, text, reply in said]
            found[each.name] = torch.tensor([one["score"] for one in verdicts])
        return found

    def total(self, scores: Mapping[str, Tensor]) -> Tensor:
        """The reward of every reply, [B]."""
        import torch

        parts = []
        for each in self._signals:
            mean, deviation = self._norm(each)
            part_B = (scores[each.name] - mean) / deviation
            if each.given.clip:
                part_B = part_B.clamp(-each.given.clip, each.given.clip)
            parts.append(each.given.weight * part_B)
        return torch.stack(parts).sum(0)

    def begin(self, scores: Mapping[str, Tensor]) -> None:
        """Take the scores of the starting policy's replies as what others are measured by."""
        self._start = {each.name: _sums(scores[each.name]).tolist() for each in self._signals if each.measured}
        self._sums = copy.deepcopy(self._start)

    def learn(self, scores: Mapping[str, Tensor], summed: Callable[[Tensor], Tensor]) -> None:
        """Count an update's scores, of all processes, into the running statistics."""
        for each in self._signals:
            if each.given.normalise is Normalise.running:
                more = summed(_sums(scores[each.name])).tolist()
                self._sums[each.name] = [a + b for a, b in zip(self._sums[each.name], more, strict=True)]

    def at_start(self) -> Signals:
        """The same with the statistics that it began with, so that looks can be compared."""
        found = copy.copy(self)
        found._sums = self._start
        return found

    def state(self) -> dict[str, list[float]]:
        """All of it that updates change, for a state that is kept."""
        return copy.deepcopy(self._sums)

    def restore(self, state: Mapping[str, list[float]]) -> None:
        """Take up what an earlier run kept."""
        self._sums = {name: list(sums) for name, sums in state.items()}

    def _norm(self, signal: Signal) -> tuple[float, float]:
        """Mean and deviation of a signal's scores; scores without a deviation keep their own scale."""
        if signal.measured:
            count, total, squares = self._sums[signal.name]
            mean = total / count
            deviation = math.sqrt(max(0.0, squares / count - mean * mean))
            return mean, deviation if deviation > _FLAT else 1.0
        if signal.given.rule is None and signal.given.normalise is Normalise.auto and self._model_norm is not None:
            return self._model_norm["mean"], self._model_norm["std"]
        return 0.0, 1.0


def _sums(scores_B: Tensor) -> Tensor:
    """Count, sum and sum of squares, [3] in float64."""
    import torch

    scores_B = scores_B.double()
    return torch.stack([torch.tensor(float(len(scores_B)), dtype=torch.float64), scores_B.sum(), (scores_B**2).sum()])
