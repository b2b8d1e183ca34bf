"""The learning-rate range test: training while the rate rises, and what its losses suggest.

"Cyclical Learning Rates for Training Neural Networks", arXiv 1506.01186, section 3.3. The rate rises exponentially
instead of linearly, so that every decade gets as many steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from align.training.loop import fit
from align.training.optimizer import Updater
from data_prep.core.errors import TrainingStopped

MARGIN = 10.0
NOT_FINITE = "not_finite"


@dataclass(frozen=True)
class Finding:
    """What a range test says."""

    smoothed: list[float]
    """Centred means of the losses, one for each rate."""
    lowest: float
    """The rate at which the smoothed loss was lowest."""
    suggestion: float | None
    """A tenth of the highest rate reached; None where the loss did not fall by more than its own noise."""
    diverged: bool
    """Whether training diverged there. If not, a higher rate might do as well: the suggestion is a lower bound."""


class RisingUpdater(Updater):
    """Takes optimiser steps at rates that rise from `share` of the groups' own to the whole of them."""

    share: float = 1.0

    def rate_factor(self) -> float:
        """`share` at the first step, 1 at the last, evenly spaced on a logarithmic scale."""
        return float(self.share ** (1.0 - self.step_number / max(1, self.steps - 1)))


class _Diverged(Exception):
    """Ends the loop."""


def range_test(updater: RisingUpdater, train: Sequence[Any], seed: int, limit: float, log: Any) -> tuple[Any, Any]:
    """(rates, losses) of the steps until the end, or until the loss is not finite or above `limit` x its lowest.

    The loss of a step is that before its update: it shows what the rates before it did. `log` is called as by `fit`.
    Losses are compared as means over a twentieth of the steps.
    """
    rates: list[float] = []
    losses: list[float] = []
    lowest = math.inf
    window = _half_width(updater.steps)

    def watch(step: int, split: str, numbers: dict[str, float]) -> None:
        nonlocal lowest
        rates.append(numbers["lr"])
        losses.append(numbers["loss"])
        log(step, split, numbers)
        recent = sum(losses[-window:]) / len(losses[-window:])
        if len(losses) >= window:
            lowest = min(lowest, recent)
            if recent > limit * lowest:
                raise _Diverged

    try:
        fit(updater, train, [], seed, watch)
    except _Diverged:
        pass
    except TrainingStopped as stop:
        if stop.code != NOT_FINITE or not losses:
            raise
    return rates, losses


def _half_width(steps: int) -> int:
    """Steps on each side of one that its smoothed loss is the mean of."""
    return max(1, steps // 20)


def finding(rates: Sequence[float], losses: Sequence[float], steps: int) -> Finding:
    """The suggestion: a tenth of the rate at which training diverged.

    That point is sharp. The other usual marks are not: the lowest loss lies on a flat stretch, a decade long with
    low-rank adapters, and the steepest slope is a difference of noisy means. docs/sweeps.md has a measurement.

    Args:
        steps: the planned length of the test, which sets the width of the smoothing.
    """
    half = _half_width(steps)
    smoothed = []
    for i in range(len(losses)):
        reach = min(half, i, len(losses) - 1 - i)  # symmetric, or the ends would be drawn towards the middle
        near = losses[i - reach : i + reach + 1]
        smoothed.append(sum(near) / len(near))
    inner = range(half, len(losses) - half) or range(len(losses))
    at = min(inner, key=smoothed.__getitem__)
    steps_apart = [(b - a) ** 2 for a, b in pairwise(losses)]
    noise = math.sqrt(sum(steps_apart) / max(1, len(steps_apart)) / 2)  # of one step's loss, whatever its trend
    start = sum(losses[: half + 1]) / len(losses[: half + 1])
    fell = start - smoothed[at] > 4.0 * noise / math.sqrt(half + 1)  # the lowest of many means is low by chance
    return Finding(smoothed, rates[at], rates[-1] / MARGIN if fell else None, len(losses) < steps)
