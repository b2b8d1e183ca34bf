"""The first SIGINT or SIGTERM of a run ends the step at work and keeps what was done; the second leaves at once.

A signal raises KeyboardInterrupt where nothing would be lost by it. Between `defer` and `settle` it only sets `wanted`:
a loop that can keep its state looks there after every step, and what has been trained is published first.

A launcher of several processes passes on what they were sent already, to each of them again: there a second signal is
no wish to leave at once, and it is the launcher that kills what does not end.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any


@dataclass
class Interrupts:
    """What signals have asked of this process."""

    wanted: bool = False
    """Whether a signal has asked the run to end."""
    insisted: bool = False
    """Whether a second one has: no time for a report."""
    deferred: bool = False
    """Whether the first signal waits for a good moment."""
    passed_on: bool = False
    """Whether a launcher passes signals on."""
    _before: dict[int, Any] = field(default_factory=dict)

    @contextmanager
    def handled(self, passed_on: bool = False) -> Iterator[None]:
        """Take SIGINT and SIGTERM inside; where they are somebody else's (a thread, a run inside a run), leave them.

        Args:
            passed_on: whether a launcher passes signals on.
        """
        if self._before:
            yield
            return
        self.wanted = self.insisted = self.deferred = False
        self.passed_on = passed_on
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._come)
        except ValueError:  # not in the main thread
            self._before.clear()
            yield
            return
        try:
            yield
        finally:
            self._give_back()
            self._before.clear()

    def defer(self) -> None:
        """From here on, until `settle`, the first signal waits."""
        self.deferred = True

    def settle(self) -> None:
        """Nothing is at work any more: a signal need not wait."""
        self.deferred = False

    def _come(self, number: int, frame: FrameType | None) -> None:
        first, self.wanted = not self.wanted, True
        if self.passed_on and not first:
            return
        if first and self.deferred:
            leaves = "" if self.passed_on else "; once more leaves at once"
            print(f"align: ends after this step and keeps its state{leaves}", file=sys.stderr)
            return
        if not first:
            self.insisted = True
            self._give_back()
        raise KeyboardInterrupt

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


interrupts = Interrupts()
"""Signals are of the whole process, and so is what they have asked."""
