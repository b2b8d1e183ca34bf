"""What a run tells while it works: numbers into `metrics.jsonl`, progress onto stderr, nothing on stdout."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.core.errors import UserError

RESERVED = ("stage", "step", "split")


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
