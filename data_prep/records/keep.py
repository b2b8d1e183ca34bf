"""Conditions on columns that a row must meet to be read: `data.keep={score: ">=4", is_safe: true, lang: [en, de]}`.

A number may be compared (`>=4`, `<0.5`, `!=0`); any other value is met by the same number, truth value or text, and a
list by one of its values. A row without the column, or with null, meets nothing.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

from data_prep.core.errors import UserError, nearest, unknown
from data_prep.sources.rows import Row, short

_FIRST = 50
_SIGNS: Mapping[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_COMPARED = re.compile(r"\s*(>=|<=|!=|==|>|<)\s*(.*?)\s*", re.DOTALL)
_TRUTH = {"true": True, "yes": True, "false": False, "no": False}


class Condition:
    """What one column must hold.

    Args:
        column: its name.
        wanted: a value, a list of values, or a text such as ">=4".

    Raises:
        UserError: a comparison with something that is no number, or a value that no column can hold.
    """

    def __init__(self, column: str, wanted: Any) -> None:
        self.column = column
        values = wanted if isinstance(wanted, list) else [wanted]
        if not values or any(isinstance(value, dict | list) or value is None for value in values):
            raise self._bad(wanted)
        self._tests = [self._test(value) for value in values]

    def holds(self, row: Row) -> bool:
        """Whether a row meets it.

        Raises:
            UserError: the column holds no number, and numbers are compared.
        """
        value = row.data.get(self.column)
        return value is not None and value != "" and any(test(row, value) for test in self._tests)

    def _test(self, wanted: Any) -> Callable[[Row, Any], bool]:
        found = _COMPARED.fullmatch(wanted) if isinstance(wanted, str) else None
        if found is None:
            return lambda row, value: _plain(value) == _plain(wanted)
        compare, number = _SIGNS[found[1]], _number(found[2])
        if number is None and found[1] in ("!=", "=="):
            return lambda row, value: compare(_plain(value), _plain(found[2]))
        if number is None:
            raise self._bad(wanted)

        def compared(row: Row, value: Any) -> bool:
            given = _number(value)
            if given is None:
                raise row.problem(
                    self.column, f"wrong type (got {short(str(value))}; expected a number, as keep compares it)"
                )
            return compare(given, number)

        return compared

    def _bad(self, wanted: Any) -> UserError:
        return UserError(
            f"wrong condition (got {wanted!r}; expected a value, a list of values, or a comparison such as '>=4')",
            field=f"data.keep.{self.column}",
            code="bad_option",
        )


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number == number else None


def _plain(value: Any) -> Any:
    """A value as tables and recipes both spell it: 1, 1.0 and "1" are one number, "True" and true one truth value."""
    if isinstance(value, bool):
        return value
    if (number := _number(value)) is not None:
        return number
    word = str(value).strip()
    return _TRUTH.get(word.lower(), word)


def kept(
    rows: Iterator[Row], conditions: list[Condition], dropped: Callable[[Row, str | UserError], None], file: str | None
) -> Iterator[Row]:
    """The rows that meet all conditions.

    Args:
        rows: the rows.
        conditions: what they must meet.
        dropped: is told of every other row, and the column that did not meet its condition or what is wrong with it.
        file: what to call the source where its rows lack a column; None: such rows are none of the conditions'.

    Raises:
        UserError: none of the first rows has the column of a condition; the nearest is offered.
    """
    first = list(islice(rows, _FIRST))
    seen = {str(key) for row in first for key in row.data}
    missing = [one for one in conditions if one.column not in seen]
    if missing and first and file is not None:
        problem = unknown("column", missing[0].column, seen)
        near = nearest(missing[0].column, seen)
        raise UserError(
            problem.message,
            field=f"data.keep.{missing[0].column}",
            code="unknown_column",
            hint=None if near else "stages.NAME.data.keep sets it for the rows of one stage",
            file=file,
        )
    asked = [one for one in conditions if one not in missing]
    for row in chain(first, rows):
        try:
            failed = next((one.column for one in asked if not one.holds(row)), None)
        except UserError as problem:
            dropped(row, problem)
            continue
        if failed is None:
            yield row
        else:
            dropped(row, failed)
