"""What a policy is rewarded for where that is more than one reward model: signals, weighed and added.

    R(x, y) = sum over k of  weight_k x clip_k(normalise_k(s_k(x, y)))

`stages.ppo.reward` lists the signals. Their sum takes the place of the reward model's normalised score; clip, end
penalty, KL penalty and everything after it are the same (`reward/shaping.py`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from align.rl.signals.base import Normalise, Said, Signal, Site

if TYPE_CHECKING:
    from torch import Tensor

    from align.inference.generation import Reply
    from data_prep.types import PromptTokens

_FLAT = 1e-6
"""Scores with a smaller deviation have none to be divided by."""


class Signals:
    """The signals of a stage at work.

    Args:
        decode: a reply's token ids -> its text.

    Raises:
        UserError: one cannot be opened.
    """

    def __init__(self, signals: Sequence[Signal], site: Site, decode: Callable[[list[int]], str]) -> None:
        self._signals = signals
        self._decode = decode
        self._scorers = {each.name: each.source.open(each.where, site) for each in signals}
        self._own = {each.name: each.source.norm(site) for each in signals if each.given.normalise is Normalise.auto}
        self._start: dict[str, list[float]] = {}
        self._sums: dict[str, list[float]] = {}

    @property
    def measured(self) -> bool:
        """Whether scores of the starting policy's replies are needed first (`begin`)."""
        return any(each.measured for each in self._signals)

    def scores(self, prompts: Sequence[PromptTokens], replies: Sequence[Reply], models_BK: Tensor) -> dict[str, Tensor]:
        """What each signal says of every reply, by name, [B] in float32; `models_BK` are the reward models' scores.

        Raises:
            UserError, TrainingStopped: one of them fails, or gives no finite numbers.
        """
        import torch

        texts = [self._decode(list(reply.ids)) for reply in replies]
        said = Said(prompts, texts, [reply.finished for reply in replies], models_BK)
        return {name: torch.tensor([one["score"] for one in score(said)]) for name, score in self._scorers.items()}

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
            if each.normalise is Normalise.running:
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
        return self._own.get(signal.name, (0.0, 1.0))


def _sums(scores_B: Tensor) -> Tensor:
    """Count, sum and sum of squares, [3] in float64."""
    import torch

    scores_B = scores_B.double()
    return torch.stack([torch.tensor(float(len(scores_B)), dtype=torch.float64), scores_B.sum(), (scores_B**2).sum()])
