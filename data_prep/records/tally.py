"""Counting what is dropped, and stopping when rows are bad or too many are lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.core.errors import UserError
from data_prep.options import LengthOptions, OnBadRow
from data_prep.rendering.truncation import TooLong
from data_prep.sources.rows import RATING

SHOWN = 20


@dataclass
class Tally:
    """Records in and dropped by reason; `source_rows` are rows of the files, readable or not.

    Of the problems only the first ones (by file and row) are kept; `bad_rows` counts all. `option` allows for them.
    """

    seen: int = 0
    source_rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    problems: list[UserError] = field(default_factory=list)
    bad_rows: int = 0
    fatal: bool = False
    option: str = "on_bad_row"

    def bad(self, problem: UserError) -> None:
        """Count one row that cannot be used; a rating in the place of a label is more than one row's fault."""
        self.fatal = self.fatal or problem.code == RATING
        self.dropped[problem.code] += 1
        self.bad_rows += 1
        self.problems.append(problem)
        if len(self.problems) > 100 * SHOWN:
            self.problems = self.first_problems()

    def broken(self, problem: UserError) -> None:
        """Count a file whose rest cannot be read, as one row more."""
        self.seen += 1
        self.bad(problem)
        self.fatal = True

    def take(self, other: Tally) -> None:
        """Add what another source lost."""
        self.seen += other.seen
        self.source_rows += other.source_rows
        self.dropped += other.dropped
        self.problems += other.problems
        self.bad_rows += other.bad_rows
        self.fatal = self.fatal or other.fatal

    def first_problems(self) -> list[UserError]:
        """The first of the problems, by file and row."""
        return sorted(self.problems, key=lambda problem: (problem.file or "", problem.row or 0))[:SHOWN]

    def check_whole(self) -> None:
        """Refuse if a file broke off: rows of unknown number are missing, which no option allows.

        Raises:
            UserError: one did; all problems are named.
        """
        if self.fatal:
            self.check_bad_rows(OnBadRow.refuse)

    def _advice(self) -> str:
        if self.fatal:
            return "mend the file: nobody knows how many rows are missing"
        return f"mend the data, or set {self.option}=drop to drop and count such rows"

    def check_bad_rows(self, on_bad_row: OnBadRow) -> None:
        """Refuse, in one line with the first problem, if there were bad rows; the first 20 are in `details`.

        Raises:
            UserError: there are bad rows and `on_bad_row` is refuse.
        """
        if not self.problems or on_bad_row is OnBadRow.drop:
            return
        problems = self.first_problems()
        first, more = problems[0], self.bad_rows - 1
        extra = f", and {more} more bad row{'s' if more > 1 else ''}" if more else ""
        refused = UserError(
            first.message + extra,
            code=first.code,
            hint=first.hint or self._advice(),
            file=first.file,
            row=first.row,
            field=first.field,
            details=[str(problem) for problem in problems] if more else (),
        )
        refused.others = problems[1:]
        raise refused


class LongRows(UserError):
    """Rows that are too long: how many of them for their prompts, and how many for their answers."""

    default_code = "too_long"
    prompts = 0
    answers = 0

    def ways(self, where: str = "") -> str:
        """What helps beside a longer `max_length`: only prompts are cut without a loss of what is learnt."""
        shorter = [f"set {where}on_long=truncate to cut prompts"] if self.prompts else []
        shorter += ["shorten or split the answers"] if self.answers else []
        return f"{', '.join(shorter)}, or set {where}max_lost to lose such rows"


def check_long(long: Sequence[TooLong], rows: int, length: LengthOptions) -> None:
    """Stop if rows longer than `max_length` are not allowed, or if too many would be lost.

    Args:
        long: the rows that are too long and were not cut.
        rows: how many rows there are, the long ones included.
        length: the rules.

    Raises:
        UserError: names the count, the longest and the first rows.
    """
    strict = [row for row in long if row.rule == "error"]
    share = len(long) / max(1, rows)
    if not strict and share <= length.max_lost:
        return
    named = strict or long
    listed = ", ".join(f"{row.id} ({row.tokens} tokens)" for row in named[:3])
    limit = "" if strict else f", over max_lost={length.max_lost:g}"
    answers = sum(row.answer for row in named)
    blamed = f", {answers} for their answers" if answers else ""
    problem = LongRows(
        f"{len(named)} of {rows} rows ({100 * len(named) / rows:.1f}%{limit}) are longer than "
        f"max_length={length.max_length} tokens{blamed}: {listed}{', ...' if len(named) > 3 else ''}; "
        f"the longest has {max(row.tokens for row in named)}",
        details=[f"{row.id}: {row.tokens} tokens" for row in named[:SHOWN]],
    )
    problem.prompts, problem.answers = len(named) - answers, answers
    problem.hint = f"raise max_length as far as the model's context allows, {problem.ways()}"
    raise problem
