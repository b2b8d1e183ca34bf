"""One open file to rows: JSON lines, JSON, CSV, TSV, Parquet and plain lines.

Every reader is a generator: it holds one row (JSON: the text of one file; Parquet: one batch of rows) at a time. A row
that cannot be read is yielded as its error, and reading goes on; what leaves the rest of a file unreadable is raised.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import IO, Any

from data_prep.errors import UserError
from data_prep.rows import Row, RowOrProblem, kind_of, short

_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")
_BROKEN = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, as surrogateescape writes them
_WRAPPERS = ("data", "rows", "examples", "train")  # {"data": [rows]}
_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars"}
_BATCH = 1000
Reader = Callable[[str, IO[bytes]], Iterator[RowOrProblem]]


def empty(path: str, what: str = "") -> UserError:
    """The error for a file without rows."""
    return UserError(f"is empty{what}", code="empty_file", file=path)


def _bad_byte(path: str, row: int | None, found: str | int, field: str | None = None) -> UserError:
    """The error for text that is not UTF-8; `found` is the byte, or the surrogate that stands for it."""
    byte = ord(found) - 0xDC00 if isinstance(found, str) else found
    return UserError(
        f"invalid UTF-8 (got byte 0x{byte:02x}; expected UTF-8 text)", code="encoding", file=path, row=row, field=field
    )


# -------------------------------------------------------------------------------------------------------------- JSON
def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's pairs; a key that stands twice is refused, as one value would silently win."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key '{next(key for key in keys if keys.count(key) > 1)}' stands twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
_LENIENT = json.JSONDecoder()  # only to find where a refused value ends


def _reason(problem: Exception) -> str:
    if isinstance(problem, json.JSONDecodeError):
        return f"{problem.msg} at line {problem.lineno}, column {problem.colno}"
    return "nested too deeply" if isinstance(problem, RecursionError) else str(problem)


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
        line = raw.removeprefix(_BOM) if number == 1 else raw
        if not line.strip():
            continue
        if first and line.lstrip()[:1] == b"[":
            raise UserError(
                "holds an array (got '['; expected one JSON object per line)", hint="call it .json", file=path
            )
        first = False
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as problem:
            yield _bad_byte(path, number, line[problem.start])
            continue
        try:
            value = _STRICT.decode(text)
        except (ValueError, RecursionError) as problem:
            at = f"{problem.msg} at column {problem.colno}" if isinstance(problem, json.JSONDecodeError) else None
            yield UserError(
                f"invalid JSON: {at or _reason(problem)} "
                f"(got {short(text.strip() or repr(text))}; expected one JSON object)",
                code="bad_json",
                file=path,
                row=number,
            )
            continue
        yield _as_row(path, number, value)


def read_json(path: str, file: IO[bytes]) -> Iterator[RowOrProblem]:
    """An array of objects; also objects one after another, one object, and {"data": [objects]}."""
    content = file.read().removeprefix(_BOM)
    text = content.decode("utf-8", "surrogateescape")
    start = _end_of_space(text, 0)
    if text[start : start + 1] == "{":
        line = text[start:].split("\n", 1)[0]
        try:
            _LENIENT.decode(line)
        except (ValueError, RecursionError):
            yield from _objects(path, text, start)
        else:
            yield from read_jsonl(path, io.BytesIO(content))
    elif text[start : start + 1] == "[":
        yield from _elements(path, text, start)
    elif start < len(text):
        value = _fatal_unless(path, 1, text, start)[0]
        raise UserError(
            f"holds {kind_of(value)} (got {short(str(value))}; expected an array of objects)",
            code="bad_json",
            file=path,
        )


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
    bad = _BROKEN.search(text, place, end)
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
        inner = [key for key in _WRAPPERS if isinstance(value, dict) and _are_objects(value.get(key))]
        if number == 1 and place == len(text) and wrong is None and len(inner) == 1:
            for inside, item in enumerate(value[inner[0]], start=1):
                yield _as_row(path, inside, item)
            return
        yield _row_or_wrong(path, number, value, wrong)


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


# ------------------------------------------------------------------------------------------------------------ tables
def _table(path: str, file: IO[bytes], **dialect: Any) -> Iterator[RowOrProblem]:
    csv.field_size_limit(2**31 - 1)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    records = csv.reader(text, strict=True, **dialect)
    header = _header(path, records, dialect.get("delimiter", ","))
    number = 0
    while header:
        try:
            record = next(records, None)
        except csv.Error as problem:
            number += 1
            yield UserError(
                f"broken quoting: {problem} (got an odd quote; expected quotes around whole fields, doubled inside)",
                code="bad_row",
                file=path,
                row=number,
            )
            continue
        if record is None:
            break
        if not record or (len(record) == 1 < len(header) and not record[0].strip()):
            continue
        number += 1
        bad = next(((at, found) for at, value in enumerate(record) if (found := _BROKEN.search(value))), None)
        if bad:
            yield _bad_byte(path, number, bad[1][0], header[bad[0]] if bad[0] < len(header) else None)
        elif len(record) != len(header):
            yield UserError(
                f"{'short' if len(record) < len(header) else 'long'} row (got {len(record)} fields; "
                f"expected {len(header)}: {', '.join(header)})",
                code="bad_row",
                file=path,
                row=number,
            )
        else:
            yield Row(path, number, dict(zip(header, record, strict=True)))
    text.detach()
    if header and not number:
        raise empty(path, " (a header without rows)")


def _header(path: str, records: Iterator[list[str]], delimiter: str) -> list[str]:
    """The names of the columns; [] when there is nothing at all.

    Raises:
        UserError: a name stands twice or is not UTF-8, or the columns are separated by another sign.
    """
    try:
        header = next((record for record in records if any(name.strip() for name in record)), [])
    except csv.Error as problem:
        raise UserError(
            f"broken quoting in the header: {problem} (got an odd quote; expected names)", code="bad_header", file=path
        ) from problem
    for name in header:
        if bad := _BROKEN.search(name):
            raise _bad_byte(path, None, bad[0], "header")
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise UserError(
            f"the header names the column '{twice[0]}' twice (got {', '.join(header)}; expected different names)",
            code="bad_header",
            file=path,
            field=twice[0],
        )
    other = [sign for sign in _DELIMITERS if len(header) == 1 and sign != delimiter and sign in header[0]]
    if other:
        raise UserError(
            f"the columns seem to be separated by {_DELIMITERS[other[0]]} (got the header {short(header[0])!r}; "
            f"expected {'tabs' if delimiter == chr(9) else 'commas'})",
            code="bad_header",
            hint="save it as comma-separated .csv or tab-separated .tsv",
            file=path,
        )
    return header


def read_csv(path: str, file: IO[bytes]) -> Iterator[RowOrProblem]:
    """Comma-separated records with a header (RFC 4180)."""
    return _table(path, file)


def read_tsv(path: str, file: IO[bytes]) -> Iterator[RowOrProblem]:
    """Tab-separated lines with a header; quotes are ordinary signs."""
    return _table(path, file, delimiter="\t", quoting=csv.QUOTE_NONE)


# ------------------------------------------------------------------------------------------------------------ others
def read_text(path: str, file: IO[bytes]) -> Iterator[RowOrProblem]:
    """One row {"text"} per line that is not blank."""
    for number, raw in enumerate(file, start=1):
        line = (raw.removeprefix(_BOM) if number == 1 else raw).removesuffix(b"\n").removesuffix(b"\r")
        if not line.strip():
            continue
        try:
            yield Row(path, number, {"text": line.decode("utf-8")})
        except UnicodeDecodeError as problem:
            yield _bad_byte(path, number, line[problem.start])


def read_parquet(path: str, file: IO[bytes]) -> Iterator[RowOrProblem]:
    """The records of a Parquet file, a batch at a time."""
    import pyarrow
    import pyarrow.parquet as parquet

    number = 0
    try:
        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(
                f"names the column '{twice}' twice (got {', '.join(names)}; expected different names)",
                code="bad_header",
                file=path,
                field=twice,
            )
        for batch in table.iter_batches(batch_size=_BATCH):
            for row in _records(path, number, batch):
                number += 1
                yield row
    except (pyarrow.ArrowException, OSError, RecursionError) as problem:
        what = "is not a whole Parquet file" if number else "is not a Parquet file"
        raise UserError(
            f"{what}: {short(str(problem), 160)}", code="bad_file", file=path, row=number + 1 if number else None
        ) from problem
    if not number:
        raise empty(path, " (no rows)")


def _records(path: str, before: int, batch: Any) -> Iterator[RowOrProblem]:
    """The rows of a record batch; text that is not UTF-8 is found row by row."""
    try:
        values = batch.to_pylist()
    except UnicodeDecodeError:
        values = None
    for place in range(batch.num_rows):
        number = before + place + 1
        if values is not None:
            yield Row(path, number, values[place])
            continue
        data: dict[str, Any] = {}
        try:
            for name in batch.schema.names:
                field = name
                data[name] = batch.column(name)[place].as_py()
        except UnicodeDecodeError as problem:
            yield _bad_byte(path, number, problem.object[problem.start], field)
        else:
            yield Row(path, number, data)


READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".txt": read_text,
    ".parquet": read_parquet,
}
