"""A recipe's own columns: texts taken apart by a pattern (`parse`), columns renamed or put together (`columns`).

Templates are "{name}" and literal text, nothing else: no format specifications, attributes or code. "{a.b}" looks into
an object, "{a.0}" into a list; the texts of a list stand one to a line. "{{" and "}}" are braces, and "\\n", which a
command line cannot say otherwise, ends a line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from string import Formatter
from typing import Any

from data_prep.core.errors import UserError, nearest
from data_prep.sources.rows import Row, RowOrProblem, kind_of, short

Part = tuple[str, str | None]
"""(literal text, name of the field behind it or None)"""


def parts_of(template: str, option: str) -> list[Part]:
    """The literal texts and fields of a template.

    Raises:
        UserError: it is not of the plain form above.
    """
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as problem:
        raise _bad(
            option, f"is no template: {problem} (got {template!r}; expected text with {{column}} in it)"
        ) from None
    for _, name, spec, conversion in parsed:
        if spec or conversion or name == "":
            raise _bad(
                option, f"holds more than {{column}} (got {template!r}; no formats, conversions or empty braces)"
            )
    parts: list[Part] = []
    before = ""  # a brace ends a part of its own
    for literal, name, _, _ in parsed:
        before += literal.replace("\\n", "\n")
        if name is not None:
            parts.append((before, name))
            before = ""
    return [*parts, (before, None)] if before else parts


def _bad(option: str, message: str) -> UserError:
    return UserError(message, code="bad_columns", field=option)


class Patterns:
    """Takes texts apart: {column: "IN: {prompt} OUT: {completion}"} gives the columns prompt and completion.

    A field reaches to the first occurrence of the literal text behind it; the pattern covers the whole text, and white
    space around a field is left out.
    """

    def __init__(self, parse: Mapping[str, str]) -> None:
        self._patterns: dict[str, tuple[str, re.Pattern[str], list[str]]] = {}
        for column, template in parse.items():
            option = f"parse.{column}"
            parts = parts_of(template, option)
            names = [name for _, name in parts if name is not None]
            if not names or len(set(names)) < len(names):
                raise _bad(option, f"needs fields with different names (got {template!r})")
            if any(not literal for literal, name in parts[1:] if name is not None):
                raise _bad(option, f"needs text between two fields (got {template!r})")
            self._patterns[column] = (template, self._pattern(parts), names)

    @staticmethod
    def _pattern(parts: Sequence[Part]) -> re.Pattern[str]:
        """Literals in order; lazy groups that cannot run past the next literal, so matching is linear."""
        pieces = []
        for place, (literal, name) in enumerate(parts):
            pieces.append(re.escape(literal.strip()) if not place else re.escape(literal))
            if name is not None:
                behind = parts[place + 1][0] if place + 1 < len(parts) else ""
                pieces.append(f"((?:(?!{re.escape(behind)})[\\s\\S])*)" if behind else "([\\s\\S]*)")
        return re.compile("".join(pieces))

    def apply(self, row: Row) -> Row:
        """The row with the columns that its texts give.

        Raises:
            UserError: a text is missing or does not fit its pattern.
        """
        data = dict(row.data)
        for column, (template, pattern, names) in self._patterns.items():
            value = row.data.get(column)
            if not isinstance(value, str):
                raise row.problem(column, f"wrong type (got {kind_of(value)}; expected text to take apart)")
            found = pattern.fullmatch(value.strip())
            if found is None:
                raise row.problem(column, f"does not fit the pattern (got {short(value)!r}; expected {template!r})")
            data.update(zip(names, (part.strip() for part in found.groups()), strict=True))
        return Row(row.file, row.row, data)


class Columns:
    """New columns from the rows' own: {ours: theirs} renames, {ours: "{a}\\n\\n{b}"} puts together.

    {theirs: ours} is read too, where only that makes sense: the rows have the left name and not the right one.

    Args:
        columns: the option.
        seen: the columns of the rows.

    Raises:
        UserError: a column that the rows do not have (the nearest is offered), or a malformed template.
    """

    def __init__(self, columns: Mapping[str, str], seen: Iterable[str]) -> None:
        have = set(seen)
        self._paths: dict[str, str] = {}
        self._templates: dict[str, list[Part]] = {}
        for left, right in columns.items():
            if "{" in right or "}" in right:
                parts = parts_of(right, f"columns.{left}")
                for name in [name for _, name in parts if name is not None]:
                    self._known(left, name, have)
                self._templates[left] = parts
            elif self._has(right, have):
                self._paths[left] = right
            elif left in have and right not in have:
                self._paths[right] = left
            else:
                self._known(left, right, have)
        renamed = {path for path in self._paths.values() if path in have}
        self._gone = renamed - set(self._paths) - set(self._templates)

    @staticmethod
    def _has(path: str, have: set[str]) -> bool:
        return path in have or path.split(".")[0] in have

    def _known(self, ours: str, path: str, have: set[str]) -> None:
        if not self._has(path, have):
            near = nearest(path, have)
            guess = f"did you mean '{near}'? " if near else ""
            raise _bad(
                f"columns.{ours}", f"the rows have no column '{path}' ({guess}columns: {', '.join(sorted(have))})"
            )

    def apply(self, row: Row) -> Row:
        """The row with its columns renamed and the new ones made.

        Raises:
            UserError: the row lacks what a column is made of.
        """
        data = {key: value for key, value in row.data.items() if key not in self._gone}
        for ours, path in self._paths.items():
            if path in row.data or "." in path:
                data[ours] = _look_up(row, path)
        for ours, parts in self._templates.items():
            data[ours] = "".join(literal + (_text(row, name) if name is not None else "") for literal, name in parts)
        return Row(row.file, row.row, data)


def _look_up(row: Row, path: str) -> Any:
    """The value at a dotted path; a column of that very name goes first.

    Raises:
        UserError: there is no such value in this row.
    """
    if path in row.data:
        return row.data[path]
    value: Any = row.data
    for step in path.split("."):
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            raise row.problem(path, f"is missing (got {kind_of(value)} without {step!r}; expected {path})")
    return value


def _text(row: Row, path: str) -> str:
    value = _look_up(row, path)
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return "\n".join(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise row.problem(path, f"wrong type (got {kind_of(value)}; expected text or a number for the template)")
    return str(value)


def made_from(columns: Mapping[str, str], parse: Mapping[str, str]) -> set[str]:
    """The columns that these options read: those that others are made of, and texts that are taken apart."""
    paths = set(parse)
    for left, right in columns.items():
        named = [name for _, name in parts_of(right, f"columns.{left}") if name] if "{" in right else [right]
        paths.update(part for name in named for part in (name, name.split(".")[0]))
    return paths


def mapped(
    rows: Iterator[RowOrProblem], columns: Mapping[str, str], parse: Mapping[str, str]
) -> Iterator[RowOrProblem]:
    """The rows with the recipe's columns; a row that lacks what they are made of gives its error."""
    if parse:
        patterns = Patterns(parse)
        rows = _each(rows, patterns.apply)
    if not columns:
        yield from rows
        return
    first: list[RowOrProblem] = []
    seen: set[str] = set()
    for row in rows:
        first.append(row)
        seen.update(row.data if isinstance(row, Row) else ())
        if len(first) >= 50:
            break
    if seen:
        own = Columns(columns, seen)
        yield from _each(first, own.apply)
        yield from _each(rows, own.apply)
    else:
        yield from first
        yield from rows


def _each(rows: Iterable[RowOrProblem], change: Any) -> Iterator[RowOrProblem]:
    for row in rows:
        if not isinstance(row, Row):
            yield row
            continue
        try:
            yield change(row)
        except UserError as problem:
            yield problem
