"""What `align check` has found, and its answer with `--json`. Imports nothing heavy: mistakes are said at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from data_prep.core.errors import UserError

WORDS = {"error": "problem", "warning": "warning"}
"""Severity -> the word in front of a printed problem."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong (`error`: the run would be refused) or hardly meant (`warning`)."""

    error: UserError
    stage: str | None
    severity: str = "error"

    def __str__(self) -> str:
        """One line, the stage in front where the error does not name it."""
        line = str(self.error)
        return line if self.stage is None or line.startswith("stages.") else f"{self.stage}: {line}"

    def as_dict(self) -> dict[str, Any]:
        """The problem as `--json` shows it."""
        return {**self.error.as_dict(), "stage": self.stage, "severity": self.severity}


@dataclass
class Findings:
    """Everything that was found, as `--json` prints it."""

    problems: list[Problem] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    preview: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether `align run` would start."""
        return not any(problem.severity == "error" for problem in self.problems)

    @property
    def warnings(self) -> int:
        """How many of the problems are warnings."""
        return sum(problem.severity == "warning" for problem in self.problems)

    def add(self, stage: str | None, errors: Iterable[UserError], severity: str = "error") -> None:
        """Take problems in; one that is known already is left out."""
        for error in errors:
            if not any(str(known) == str(Problem(error, stage)) for known in self.problems):
                self.problems.append(Problem(error, stage, severity))

    def rows(self) -> dict[str, Any]:
        """Rows in, kept, dropped by reason and truncated, over all data."""
        total: dict[str, Any] = {"in": 0, "kept": 0, "dropped": {}, "truncated": 0}
        for entry in self.data.values():
            for key in ("in", "kept", "truncated"):
                total[key] += entry["rows"][key]
            for reason, count in entry["rows"]["dropped"].items():
                total["dropped"][reason] = total["dropped"].get(reason, 0) + count
        return total

    def as_dict(self) -> dict[str, Any]:
        """The answer of `align check --json`."""
        return {
            "ok": self.ok,
            "problems": [problem.as_dict() for problem in self.problems],
            "rows": self.rows(),
            "preview": self.preview,
            "model": self.model,
            "stages": self.stages,
            "data": self.data,
        }

    def verdict(self) -> str:
        """The last line: how many problems and warnings there are."""
        warnings = self.warnings
        errors = len(self.problems) - warnings
        words = f"{errors} problem{'' if errors == 1 else 's'}" if errors else "no problems"
        return f"{words}, {warnings} warning{'' if warnings == 1 else 's'}" if warnings else words
