"""The two exceptions a user may see, and the search for the nearest valid name.

Both print as exactly one line: `file:row:field: message; hint`, with missing parts left out.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any


def _one_line(text: str) -> str:
    """Fold every run of white space, line ends too, to one space."""
    return " ".join(str(text).split())


def whole_sentences(text: str, most: int = 400) -> str:
    """The text in one line, without the last full stop; a longer one up to the last end of a sentence that fits, with
    a sign that there is more."""
    line = _one_line(text).rstrip(".")
    if len(line) <= most:
        return line
    ends = [found.start() for found in re.finditer(r"[.;!?] ", line[: most + 1])]
    space = line.rfind(" ", 0, most + 1)
    return f"{line[: ends[-1] if ends else space if space > 0 else most]} [\u2026]"


def said_by(problem: BaseException) -> str:
    """What an exception of a library says, to stand inside a line of ours; its kind where it says nothing."""
    return whole_sentences(str(problem)) or type(problem).__name__


class _OneLineError(Exception):
    """An error that knows where it happened and prints as one line.

    Args:
        message: what is wrong, in one sentence.
        code: short machine-readable name.
        hint: what to do about it.
        file, row, field: where; rows count from 1.
        details: the first problems of the same kind, one line each, where there are several; printed above the line.

    Attributes:
        others: further problems of the same kind, as errors.
    """

    exit_code = 1
    default_code = "error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        hint: str | None = None,
        file: str | None = None,
        row: int | None = None,
        field: str | None = None,
        details: Iterable[str] = (),
    ) -> None:
        super().__init__(message)
        self.message = _one_line(message)
        self.code = code or self.default_code
        self.hint = _one_line(hint) if hint else None
        self.file = str(file) if file is not None else None
        self.row = row
        self.field = field
        self.details = list(details)
        self.others: list[UserError] = []

    def __str__(self) -> str:
        """The one line."""
        where = ":".join(str(part) for part in (self.file, self.row, self.field) if part is not None)
        line = f"{where}: {self.message}" if where else self.message
        return _one_line(f"{line}; {self.hint}" if self.hint else line)

    def in_full(self, program: str) -> str:
        """What a screen shows: the details, and below them the one line, said by `program`."""
        return "\n".join([*(f"  {detail}" for detail in self.details), f"{program}: {self}"])

    def as_dict(self) -> dict[str, Any]:
        """The error as the `error` object of `--json` output."""
        return {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "file": self.file,
            "row": self.row,
            "field": self.field,
            **({"details": self.details} if self.details else {}),
        }


class UserError(_OneLineError):
    """Something the user can mend: exit code 2."""

    exit_code = 2
    default_code = "user_error"


class TrainingStopped(_OneLineError):
    """Training stopped itself (NaN, a broken invariant): exit code 3."""

    exit_code = 3
    default_code = "training_stopped"


def at_row(identity: str, problem: UserError) -> UserError:
    """The same problem, said of the row with this id ("file:row", or "file:row#part" for a row made of it)."""
    if problem.file is not None:
        return problem
    file, _, row = identity.rpartition(":")
    number = row.split("#")[0]
    return UserError(
        problem.message,
        code=problem.code,
        hint=problem.hint,
        file=file or None,
        row=int(number) if number.isdigit() else None,
        field=problem.field,
        details=problem.details,
    )


def nearest(name: str, choices: Iterable[str], least: float = 0.6) -> str | None:
    """The choice most like `name`, or None when none is close; `least` is how close, 1 being the same."""
    pool = [str(choice) for choice in choices]
    lowered = {choice.lower(): choice for choice in pool}
    if str(name).lower() in lowered:
        return lowered[str(name).lower()]
    found = difflib.get_close_matches(str(name).lower(), list(lowered), n=1, cutoff=least)
    return lowered[found[0]] if found else None


def unknown(kind: str, name: str, choices: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest one that does.

    Returns (does not raise): `unknown adapter 'lorra' (did you mean 'lora'? choices: full, lora)`.
    """
    pool = sorted(str(choice) for choice in choices)
    near = nearest(name, pool)
    guess = f"did you mean '{near}'? " if near else ""
    listed = ", ".join(pool) if pool else "none"
    return UserError(f"unknown {kind} '{name}' ({guess}choices: {listed})", code=f"unknown_{kind.replace(' ', '_')}")
