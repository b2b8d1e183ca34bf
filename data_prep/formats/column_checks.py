"""The checks of single columns that all formats share; each complaint names file, row and field."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from data_prep.core.errors import nearest
from data_prep.formats.spelled import like_messages, value_of
from data_prep.sources.rows import Row, kind_of, short, side_of

_BLANK = re.compile("[\\s\u200b-\u200f\u2060\ufeff]*")


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
        raise row.problem(field, f"wrong type (got {got}; expected text{_part_of(row, field, value)})")
    if not empty and _BLANK.fullmatch(value):
        raise row.problem(field, f"empty (got {short(value)!r}; expected text)", code="empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise row.problem(field, "half of a character (got a lone surrogate; expected valid Unicode)") from problem
    return value


def _part_of(row: Row, field: str, value: Any) -> str:
    """How a column of objects is read: by the name of a part that is text; nothing where there is none."""
    parts = [str(name) for name, one in value.items() if isinstance(one, str)] if isinstance(value, dict) else []
    if not parts or field not in row.data:
        return ""
    return f"; columns={{{field}: {field}.{parts[0]}}} takes one part of it, here of {short(', '.join(parts), 60)}"


def text_field(row: Row, *names: str, empty: bool = False) -> str:
    """The text of the first of these columns that the row has.

    Raises:
        UserError: none is there, it is no text, or it spells messages, which would be read as words.
    """
    field = find_key(row, names)
    value = row.data[field]
    if isinstance(value, str) and like_messages(value):
        raise row.problem(
            field,
            f"spells messages (got {short(value)!r}; expected text; columns={{messages: {field}}}, or prompt, "
            "completion, chosen and rejected in its place, reads them)",
        )
    return text_of(row, field, value, empty=empty)


def optional_text(row: Row, *names: str) -> str:
    """The text of the first of these columns that the row has; "" when there is none."""
    for name in names:
        if row.data.get(name) is not None:
            return text_of(row, name, row.data[name], empty=True)
    return ""


def written_out(row: Row, field: str, notes: Counter[str]) -> Row:
    """The row with a number, or true or false, in an answer's column written as JSON writes it; counted in `notes`."""
    value = row.data.get(field)
    if not isinstance(value, bool | int | float) or value != value or value in (float("inf"), float("-inf")):
        return row
    notes["answers that are numbers, or true or false, read as text"] += 1
    return Row(row.file, row.row, {**row.data, field: json.dumps(value)})


def meta_of(row: Row) -> dict[str, Any]:
    """{"split": "train" | "eval", "task": text, "features": ...}: what the row's columns of these names say, if it has
    them."""
    found, task, value = features_of(row), row.data.get("task"), row.data.get("split")
    if isinstance(task, str) and task.strip():
        found["task"] = task.strip()
    if value is None or value == "":
        return found
    side = side_of(value) if isinstance(value, str) else None
    if side is None:
        raise row.problem("split", f"unknown split (got {short(str(value))!r}; expected train or eval)")
    return {**found, "split": side}


def features_of(row: Row, column: str = "features") -> dict[str, Any]:
    """{"features": a category or numbers}: what the row's column says, if it has it; tables spell numbers as a list.

    Raises:
        UserError: it is neither, or a number is not finite.
    """
    value = listed(row, column, row.data.get(column))
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        return {"features": text_of(row, column, value).strip()}
    if isinstance(value, bool) or not isinstance(value, int | float | list) or value == []:
        got = "an empty list" if value == [] else kind_of(value)
        raise row.problem(column, f"wrong type (got {got}; expected a category, or a list of numbers)")
    return {"features": tuple(number_of(row, column, x) for x in (value if isinstance(value, list) else [value]))}


TRUTHS = ("ground_truth", "reference_answer")
"""Columns that hold the right answer to a prompt, for rules that compare replies with it."""


INSTRUCTIONS = ("instructions", "instruction_id_list", "kwargs")
"""Columns that hold instructions which a rule can verify; the last two as in IFEval."""


def truth_of(row: Row) -> dict[str, Any]:
    """What rules judge replies to the row by, where it is given: `ground_truth`, and `instructions` of {id, kwargs}."""
    value = next((row.data[name] for name in TRUTHS if row.data.get(name) is not None), None)
    judge = row.data.get("reward_model")
    if value is None and isinstance(judge, dict):  # verl
        value = judge.get("ground_truth")
    truth = {} if value is None else {"ground_truth": value if isinstance(value, str | int | float) else str(value)}
    return {**truth, **_instructions_of(row)}


def _instructions_of(row: Row) -> dict[str, Any]:
    """{"instructions": [{"id", "kwargs"}]}, from a column of such or from IFEval's two."""
    found, names = row.data.get("instructions"), row.data.get("instruction_id_list")
    if names is not None:
        fields = row.data.get("kwargs") or [{}] * len(names)
        if not isinstance(names, list) or not isinstance(fields, list) or len(names) != len(fields):
            raise row.problem("kwargs", "expected as many kwargs as instruction_id_list has ids")
        found = [{"id": name, "kwargs": kwargs} for name, kwargs in zip(names, fields, strict=True)]
    if not isinstance(found, list):  # a text of that name is another thing
        return {}
    if not all(isinstance(each, dict) and "id" in each for each in found):
        raise row.problem("instructions", "expected a list of {id, kwargs}")
    return {"instructions": found}


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
    """`value`, or the list that it spells (tables have no other way to hold one)."""
    return (
        json_of(row, field, value) if isinstance(value, str) and value.lstrip().startswith(("[", "array(")) else value
    )


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
    """The value that a text spells, in JSON or as Python prints it.

    Raises:
        UserError: it spells none.
    """
    try:
        return value_of(text)
    except ValueError as problem:
        raise row.problem(field, f"invalid JSON: {problem} (got {short(text)!r}; expected JSON)") from problem
