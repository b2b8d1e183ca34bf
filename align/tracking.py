"""What a run tells while it works: numbers into `metrics.jsonl`, progress onto stderr, nothing on stdout."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from data_prep.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID
    from typing_extensions import Self

RESERVED = ("stage", "step", "split")
SECONDS_BETWEEN_LINES = 10.0


class Metrics:
    """Appends the rows of one stage to `metrics.jsonl`; rows are written whole, so a kill tears at most one.

    Args:
        path: the file; made with its folder when missing. A torn last row, left by a killed run, is cut off.
        stage: the stage's name, written into every row.
        also: called with every row after it has been written.
    """

    def __init__(self, path: Path, stage: str, also: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.path = Path(path)
        self.stage = stage
        self.also = also
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            held = self.path.read_bytes()
            whole = held.rfind(b"\n") + 1
            if whole < len(held):
                with self.path.open("r+b") as file:
                    file.truncate(whole)

    def log(self, step: int, split: str, values: dict[str, float]) -> None:
        """Append one row: stage, step (optimiser steps done), split (train | eval) and flat numbers.

        Raises:
            ValueError: a value is not a finite number, or a key is one of stage, step, split. The file is
                left as it was.
        """
        row: dict[str, Any] = {"stage": self.stage, "step": int(step), "split": split}
        for key, value in values.items():
            number = value if isinstance(value, int) else float(value)
            if key in RESERVED or not math.isfinite(number):
                raise ValueError(f"{self.stage} step {step}: '{key}' = {number} cannot be logged")
            row[key] = number
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        if self.also is not None:
            self.also(row)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows of a `metrics.jsonl`, in order; [] when there is no file.

    A torn last row (no line end) is left out. A resumed run may have written a step twice: index the rows by
    stage, step and split, and the later ones replace the earlier.

    Raises:
        UserError: a whole row is not a JSON object (file and row are named).
    """
    if not Path(path).exists():
        return []
    text = Path(path).read_text(encoding="utf-8")
    rows = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise UserError("not a JSON object", code="bad_metrics", file=str(path), row=number)
        rows.append(row)
    return rows


class Progress:
    """Context manager that shows how far a loop is, on stderr.

    On a terminal: a bar with the time left. Elsewhere: a plain line at most every 10 s, and one at the end.

    Args:
        description: what is being done, for instance the stage's name.
        total: how many steps there are.
        enabled: False shows nothing (every process but the first).
        done: steps that an earlier run has done.
    """

    def __init__(self, description: str, total: int, *, enabled: bool = True, done: int = 0) -> None:
        self.description = description
        self.total = total
        self.enabled = enabled
        self.done = self._before = done
        self.numbers: dict[str, float] = {}
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._began = self._told = time.monotonic()

    def __enter__(self) -> Self:
        self._began = self._told = time.monotonic()
        if self.enabled and sys.stderr.isatty():
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
        took = self._told - self._began
        left = took / (self.done - self._before) * (self.total - self.done) if self.done > self._before else 0.0
        time_part = f"{left:.0f} s left" if 0 < self.done < self.total else f"{took:.1f} s"
        parts = [f"{self.description} {self.done}/{self.total}", self._shown(), time_part]
        print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        else:
            self._tell()
