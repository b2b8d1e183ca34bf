"""The evaluation rows of a stage, told apart by task where they name two tasks or more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from align.training import Batch, Updater

RowT = TypeVar("RowT")
MOST_TASKS = 50
"""With more, rows are not told apart: a column of this name then holds something else."""


def by_task(rows: Sequence[RowT]) -> dict[str, list[RowT]]:
    """Rows by what they name as their task, in the order of the names; '' where they name none."""
    found: dict[str, list[RowT]] = {}
    for row in rows:
        found.setdefault(getattr(row, "task", None) or "", []).append(row)
    return dict(sorted(found.items())) if len(found) <= MOST_TASKS else {"": list(rows)}


@dataclass
class HeldOut:
    """Evaluation batches by task."""

    updater: Updater
    parts: dict[str, tuple[list[Batch], bool]]
    """Task -> this process's micro-batches, and whether they count."""

    def evaluate(self) -> dict[str, float]:
        """Numbers over all rows and, where there are several tasks, of each of them as NAME/TASK."""
        found = {task: self.updater.weighed(*part) for task, part in self.parts.items()}
        if len(found) == 1:
            return next(iter(found.values()))[0]
        units = sum(weight for _, weight in found.values())
        names = next(iter(found.values()))[0]
        numbers = {name: sum(part[name] * weight for part, weight in found.values()) / units for name in names}
        return numbers | {
            f"{name}/{task or 'other'}": part[name] for task, (part, _) in found.items() for name in names
        }
