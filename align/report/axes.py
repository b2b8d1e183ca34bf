"""Axes of drawings: round marks, and where a value stands; for the report and a sweep's page alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def ticks(low: float, high: float, about: int = 3) -> list[float]:
    """Round values that span low..high, about `about` steps apart; the first and last enclose the range."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-3):
        pad = abs(high) * 0.1 or 0.5
        low, high = low - pad, high + pad
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 0.02), math.ceil(high / step - 0.02)  # a hair outside is no step more
    digits = max(0, 12 - math.ceil(math.log10(max(abs(low), abs(high), step))))
    return [round(i * step, digits) for i in range(first, last + 1)]


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` along a line from `start` to `end`, which are in the units of the drawing.

    Where `log` is set, `low` and `high` are logarithms to base ten of the values at the ends.
    """

    low: float
    high: float
    start: float
    end: float
    marks: Sequence[float] = ()
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value stands, to a tenth of a unit."""
        share = ((math.log10(value) if self.log else value) - self.low) / ((self.high - self.low) or 1.0)
        return round(self.start + share * (self.end - self.start), 1)


def axis_over(values: Sequence[float], start: float, end: float, about: int = 4, log: bool = False) -> Axis:
    """An axis with round marks that holds these values; a logarithmic one leaves a little room at both ends."""
    low, high = min(values), max(values)
    if not log:
        marks = ticks(low, high, about)
        return Axis(marks[0], marks[-1], start, end, marks)
    low, high = math.log10(low), math.log10(high)
    pad = 0.04 * (high - low) or 0.3
    steps = (1, 2, 5) if high - low < 2.2 else (1,)
    every = max(1, math.ceil((high - low) / 8))
    powers = range(math.floor(low - pad), math.ceil(high + pad) + 1, every)
    marks = [m * 10.0**p for p in powers for m in steps if low - pad <= math.log10(m * 10.0**p) <= high + pad]
    return Axis(low - pad, high + pad, start, end, marks, log)
