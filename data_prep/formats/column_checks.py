"""The checks of single columns that all formats share; each complaint names file, row and field."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from data_prep.core.errors import nearest
from data_prep.sources.rows import Row, kind_of, short

_BLANK = re.compile("[\\s\u200b-\u200f\u2060\ufeff]*")
_SPLITS = {"train": "train", "eval": "eval", "validation": "eval", "valid": "eval", "dev": "eval", "test": "eval"}


def find_key(row: Row, names: Sequence[str]) -> str:
    """The first of `names` that the row has.

    Raises:
        UserError: none is there; the nearest existing key is offered.
    """
    for name in names:
        if row.data.get(name) is not None:
            return name
    here = [name for name in names if name in row.data]
    if here:
        raise row.problem(here[0], "is missing (got null; expected text)")
    near = next((key for key in (nearest(name, row.data) for name in names) if key and key not in names), None)
    guess = f"; did you mean the column '{near}'?" if near else ""
    got = short(", ".join(map(str, row.data)) or "none", 200)
    wanted = " or ".join(list(dict.fromkeys(names))[:4])
    raise row.problem(names[0], f"is missing (got the columns {got}; expected {wanted}{guess})")


def text_of(row: Row, field: str, value: Any, *, empty: bool = False) -> str:
    """`value` as text; white space and invisible signs alone count as empty.

    Raises:
        UserError: not text, or empty where it may not be, or not encodable (a lone surrogate).
    """
    if not isinstance(value, str):
        got = kind_of(value) if value is None or isinstance(value, bool) else f"{kind_of(value)} {short(str(value))}"
        raise row.problem(field, f"wrong type (got {got}; expected text)")
    if not empty and _BLANK.fullmatch(value):
        raise row.problem(field, f"empty (got {short(value)!r}; expected text)", code="empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise row.problem(field, "half of a character (got a lone surrogate; expected valid Unicode)") from problem
    return value


def text_field(row: Row, *names: str, empty: bool = False) -> str:
    """The text of the first of these columns that the row has."""
    field = find_key(row, names)
    return text_of(row, field, row.data[field], empty=empty)


def optional_text(row: Row, *names: str) -> str:
    """The text of the first of these columns that the row has; "" when there is none."""
    for name in names:
        if row.data.get(name) is not None:
            return text_of(row, name, row.data[name], empty=True)
    return ""


def meta_of(row: Row) -> dict[str, Any]:
    """{"split": "train" | "eval", "task": text}: what the row's columns of these names say, if it has them."""
    found, task, value = {}, row.data.get("task"), row.data.get("split")
    if isinstance(task, str) and task.strip():
        found["task"] = task.strip()
    if value is None or value == "":
        return found
    if not isinstance(value, str) or value not in _SPLITS:
        raise row.problem("split", f"unknown split (got {short(str(value))!r}; expected train or eval)")
    return {**found, "split": _SPLITS[value]}


def number_of(row: Row, field: str, value: Any) -> float:
    """`value` as a finite number; text that spells one (CSV) is one.

    Raises:
        UserError: it is not, or it is NaN or infinite.
    """
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if number != number or number in (float("inf"), float("-inf")):
        raise row.problem(field, f"wrong type (got {short(str(value))}; expected a number)")
    return number


def number_field(row: Row, field: str) -> float | None:
    """A finite number, or None when the column is missing or null."""
    value = row.data.get(field)
    return None if value is None or value == "" else number_of(row, field, value)


def list_field(row: Row, *names: str) -> tuple[str, list[Any]]:
    """(name, value) of the first of these columns: a list with something in it.

    Raises:
        UserError: it is missing, no list, or empty.
    """
    field = find_key(row, names)
    value = listed(row, field, row.data[field])
    if not isinstance(value, list):
        raise row.problem(field, f"wrong type (got {kind_of(value)}; expected a list)")
    if not value:
        raise row.problem(field, "empty (got an empty list; expected something in it)", code="empty")
    return field, value


def listed(row: Row, field: str, value: Any) -> Any:
    """`value`, or the list that it spells in JSON (tables have no other way to hold one)."""
    return json_of(row, field, value) if isinstance(value, str) and value.lstrip()[:1] == "[" else value


def object_of(row: Row, field: str, value: Any) -> dict[str, Any]:
    """`value` as an object, or as text that spells one in JSON.

    Raises:
        UserError: it is neither.
    """
    if isinstance(value, str):
        value = json_of(row, field, value)
    if not isinstance(value, dict):
        raise row.problem(field, f"wrong type (got {kind_of(value)}; expected an object)")
    return value


def json_of(row: Row, field: str, text: str) -> Any:
    """The JSON value that a text spells.

    Raises:
        UserError: it is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        what = "nested too deeply" if isinstance(problem, RecursionError) else problem
        raise row.problem(field, f"invalid JSON: {what} (got {short(text)!r}; expected JSON)") from problem
