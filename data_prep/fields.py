"""The one way to declare an option: a dataclass field with the string that `--help` prints and its bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Bounds:
    """The interval of a number; `above` and `below` are ends that it must not reach."""

    low: float = 0.0
    high: float = math.inf
    above: float | None = None
    below: float | None = None

    def problem(self, value: float) -> str | None:
        """What is wrong with a value, as the end of a sentence, or None."""
        low = value > self.above if self.above is not None else value >= self.low
        high = value < self.below if self.below is not None else value <= self.high
        return None if low and high and not math.isnan(value) else f"expected {self}"

    def __str__(self) -> str:
        low = f"more than {self.above:g}" if self.above is not None else f"at least {self.low:g}"
        if self.below is not None:
            return f"{low} and less than {self.below:g}"
        return low if math.isinf(self.high) else f"{low} and at most {self.high:g}"


def option(default: Any, help: str, **bounds: float) -> Any:
    """A dataclass field with a default and its help string; numbers are at least 0 unless `bounds` say otherwise."""
    is_number = isinstance(default, int | float) and not isinstance(default, bool)
    metadata: dict[str, Any] = {"help": help}
    if is_number or bounds:
        metadata["bounds"] = Bounds(**bounds)
    return field(default=default, metadata=metadata)


def mapping(help: str) -> Any:
    """A dataclass field that holds a mapping, empty by default."""
    return field(default_factory=dict, metadata={"help": help})
