"""One open file of JSON lines or JSON to rows; as strict as `readers` says."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from data_prep.core.errors import UserError
from data_prep.sources.rows import BOM, BROKEN, Row, RowOrProblem, bad_byte, empty, kind_of, short

_SPACE = re.compile(r"[ \t\n\r]*")
_WRAPPERS = ("data", "rows", "examples", "train")  # {"data": [rows]}
_SPLITS = ("test", "validation", "valid", "dev", "eval")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's pairs; a key that stands twice is refused, as one value would silently win."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key '{next(key for key in keys if keys.count(key) > 1)}' stands twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    """A number with a point or an exponent; one beyond a double's range would silently become infinite."""
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {short(text)} is out of range")
    return number


_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)
_LENIENT = json.JSONDecoder(parse_int=len)  # only to find where a refused value ends


def _reason(problem: Exception, *, lines: bool = True) -> str:
    """What is wrong in a JSON text; `lines`: whether it has several."""
    if isinstance(problem, json.JSONDecodeError):
        place = f"line {problem.lineno}, column {problem.colno}" if lines else f"column {problem.colno}"
        return f"{problem.msg.removesuffix(' at')} at {place}"
    if isinstance(problem, RecursionError):
        return "nested too deeply"
    return "a number with too many digits" if "set_int_max_str_digits" in str(problem) else str(problem)


def _as_row(path: str, number: int, value: Any) -> RowOrProblem:
    if isinstance(value, dict):
        return Row(path, number, value)
    shown = "" if value is None else f" {short(str(value))}"
    return UserError(
        f"is not an object (got {kind_of(value)}{shown}; expected an object with named columns)",
        code="bad_row",
        file=path,
        row=number,
    )


def read_jsonl(path: str, file: IO[bytes]) -> Iterator[RowOrProblem]:
    """One object per line."""
    first = True
    for number, raw in enumerate(file, start=1):
        line = raw.removeprefix(BOM) if number == 1 else raw
        if not line.strip():
            continue
        if first and (line.lstrip()[:1] == b"[" or line.strip() == b"{"):
            what = "an array" if line.lstrip()[:1] == b"[" else "objects of several lines"
            raise UserError(
                f"holds {what} (got {line.decode(errors='replace')[:1]!r}; expected one JSON object per line)",
                hint="call it .json",
                file=path,
            )
        first = False
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as problem:
            yield bad_byte(path, number, line[problem.start])
            continue
        try:
            value = _STRICT.decode(text)
        except (ValueError, RecursionError) as problem:
            yield UserError(
                f"invalid JSON: {_reason(problem, lines=False)} "
                f"(got {short(text.strip() or repr(text))}; expected one JSON object)",
                code="bad_json",
                file=path,
                row=number,
            )
            continue
        yield _as_row(path, number, value)


def read_json(path: str, file: IO[bytes]) -> Iterator[RowOrProblem]:
    """An array of objects; also objects one after another, one object, and {"data": [objects]}."""
    content = file.read().removeprefix(BOM)
    text = content.decode("utf-8", "surrogateescape")
    start = _end_of_space(text, 0)
    if text[start : start + 1] == "{":
        if _lines(text[start:]):
            yield from read_jsonl(path, io.BytesIO(content))
        else:
            yield from _objects(path, text, start)
    elif text[start : start + 1] == "[":
        yield from _elements(path, text, start)
    elif start < len(text):
        value = _fatal_unless(path, 1, text, start)[0]
        raise UserError(
            f"holds {kind_of(value)} (got {short(str(value))}; expected an array of objects)",
            code="bad_json",
            file=path,
        )


def _lines(text: str) -> bool:
    """Whether there is more than one line, and the first is a JSON value by itself."""
    first, _, rest = text.partition("\n")
    try:
        _LENIENT.decode(first)
    except (ValueError, RecursionError):
        return False
    return bool(rest.strip())


def _end_of_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return found.end() if found else place


def _fatal_unless(path: str, number: int, text: str, place: int) -> tuple[Any, int, str | None]:
    """(value, its end, what is wrong with it) of the JSON value at `place`.

    Raises:
        UserError: it is not JSON, so nothing behind it can be read.
    """
    try:
        value, end = _STRICT.raw_decode(text, place)
        wrong = None
    except (ValueError, RecursionError) as problem:
        try:
            value, end = _LENIENT.raw_decode(text, place)
            wrong = _reason(problem)
        except (ValueError, RecursionError):
            raise _broken(path, number, _reason(problem)) from problem
    bad = BROKEN.search(text, place, end)
    return value, end, (f"invalid UTF-8 byte 0x{ord(bad[0]) - 0xDC00:02x}" if bad else wrong)


def _broken(path: str, number: int, what: str) -> UserError:
    return UserError(
        f"invalid JSON: {what} (got a broken file; expected an array of objects): the rest cannot be read",
        code="broken_file",
        file=path,
        row=number,
    )


def _at(text: str, place: int) -> str:
    line = text.count("\n", 0, place) + 1
    return f"line {line}, column {place - text.rfind(chr(10), 0, place)}"


def _row_or_wrong(path: str, number: int, value: Any, wrong: str | None) -> RowOrProblem:
    if wrong is None:
        return _as_row(path, number, value)
    code = "encoding" if wrong.startswith("invalid UTF-8") else "bad_json"
    shown = short(json.dumps(value)) if code == "bad_json" else "other bytes"
    what = wrong if code == "encoding" else f"invalid JSON: {wrong}"
    return UserError(f"{what} (got {shown}; expected an object of UTF-8 text)", code=code, file=path, row=number)


def _elements(path: str, text: str, start: int) -> Iterator[RowOrProblem]:
    """The elements of the array that begins at `start`, decoded one at a time."""
    place = _end_of_space(text, start + 1)
    number = 0
    closed = text[place : place + 1] == "]"
    while not closed:
        number += 1
        value, end, wrong = _fatal_unless(path, number, text, place)
        yield _row_or_wrong(path, number, value, wrong)
        place = _end_of_space(text, end)
        sign = text[place : place + 1]
        if sign not in (",", "]"):
            raise _broken(path, number + (sign != ""), f"Expecting ',' delimiter at {_at(text, place)}")
        closed = sign == "]"
        place = place if closed else _end_of_space(text, place + 1)
    place = _end_of_space(text, place + 1)
    if place < len(text):
        raise _broken(path, number + 1, f"Extra data at {_at(text, place)}")
    if not number:
        raise empty(path, " (an array without rows)")


def _objects(path: str, text: str, place: int) -> Iterator[RowOrProblem]:
    """Objects one after another over any number of lines; one object that wraps the rows is opened."""
    number = 0
    while place < len(text):
        number += 1
        value, end, wrong = _fatal_unless(path, number, text, place)
        place = _end_of_space(text, end)
        inner = _wrapped(path, value) if number == 1 and place == len(text) and wrong is None else None
        if inner is None:
            yield _row_or_wrong(path, number, value, wrong)
        for inside, item in enumerate(inner or (), start=1):
            yield _as_row(path, inside, item)


def _columns(value: dict[str, Any]) -> bool:
    """Whether an object is a table by columns or by numbers, in one of the forms that pandas writes."""
    if {"columns", "data"} <= value.keys() <= {"columns", "index", "data"}:
        return True
    parts = list(value.values())
    if all(isinstance(part, dict) for part in parts):
        inner = {tuple(part) for part in parts}
        names = next(iter(inner), ())
        return len(inner) == 1 and bool(names) and (all(map(str.isdecimal, names)) or all(map(str.isdecimal, value)))
    return len(parts) > 1 and all(
        isinstance(part, list) and len(part) == len(parts[0]) > 1 and isinstance(part[0], str | int | float)
        for part in parts
    )


def _wrapped(path: str, value: Any) -> list[Any] | None:
    """The rows that one object wraps, {"data": [rows], ...}; None if it is a row itself.

    Raises:
        UserError: it wraps none, several lists of rows, of which one would silently win, or columns.
    """
    if not isinstance(value, dict):
        return None
    if _columns(value):
        raise UserError(
            f"holds columns (got {short(', '.join(value))}; expected an array of objects, a row each)",
            code="bad_json",
            hint="write rows: to_json(FILE, orient='records') of pandas",
            file=path,
        )
    lists = [key for key in (*_WRAPPERS, *_SPLITS) if isinstance(value.get(key), list)]
    inner = [key for key in lists if not value[key] or isinstance(value[key][0], dict)]
    if len(inner) > 1:
        raise UserError(
            f"holds several lists of rows (got {', '.join(inner)}; expected one)",
            code="several_lists",
            hint="save each as a file of its own",
            file=path,
        )
    if inner and inner[0] in _WRAPPERS and not value[inner[0]] and len(value) - len(lists) < 2:
        raise empty(path, f" (no rows under '{inner[0]}')")
    return value[inner[0]] if inner and value[inner[0]] else None
