"""Progress of long work: one line with the time left, a bar on a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID
    from typing_extensions import Self

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Context manager that shows how far a loop is, on stderr.

    On a terminal: a bar with the time left. Elsewhere: a plain line at most every 10 s, and one at the end unless the
    last one said so already.

    Args:
        description: what is being done, for instance the stage's name.
        total: how many steps there are; None where nobody knows, as of the rows of a stream: then only work that
            takes long is told, as a plain line with the steps a second.
        enabled: False shows nothing (every process but the first).
        done: steps that an earlier run has done.
        unit: what a step is.
    """

    def __init__(
        self, description: str, total: int | None, *, enabled: bool = True, done: int = 0, unit: str = "steps"
    ) -> None:
        self.description = description
        self.total = total
        self.enabled = enabled
        self.unit = unit
        self.done = self._before = done
        self.numbers: dict[str, float] = {}
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._said: tuple[int, str] | None = None
        """Steps done and the numbers beside them, as the last line told them."""
        self._began = self._told = time.monotonic()

    def __enter__(self) -> Self:
        self._began = self._told = time.monotonic()
        if self.enabled and self.total is not None and sys.stderr.isatty():
            self._start_bar()
        return self

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("[bold]{task.description}", markup=True),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}", style="dim", markup=False),
        )
        self._bar = Bar(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task(self.description, total=self.total, completed=self.done, numbers="")
        self._bar.start()

    def advance(self, n: int = 1, **numbers: float) -> None:
        """Count `n` steps as done and show the newest numbers beside the bar."""
        self.done += n
        self.show(**numbers)
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, n)
        elif time.monotonic() - self._told >= SECONDS_BETWEEN_LINES:
            self._tell()

    def show(self, **numbers: float) -> None:
        """Show numbers beside the bar without counting a step; an old number stays until it is replaced."""
        self.numbers.update(numbers)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, numbers=self._shown())

    def _shown(self) -> str:
        return " ".join(f"{key} {float(value):.4g}" for key, value in self.numbers.items())

    def _tell(self) -> None:
        if not self.enabled:
            return
        self._told = time.monotonic()
        self._said = (self.done, self._shown())
        took = self._told - self._began
        if self.total is None:
            speed = (self.done - self._before) / max(took, 1e-9)
            line = f"{self.description}: {self.done:,} {self.unit}, {speed:,.0f} {self.unit}/s"
            print(line, file=sys.stderr, flush=True)
            return
        left = took / (self.done - self._before) * (self.total - self.done) if self.done > self._before else 0.0
        time_part = f"{left:.0f} s left" if 0 < self.done < self.total else f"{took:.1f} s"
        parts = [f"{self.description} {self.done}/{self.total}", self._shown(), time_part]
        print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif (self.total is not None or self._said) and self._said != (self.done, self._shown()):
            self._tell()
