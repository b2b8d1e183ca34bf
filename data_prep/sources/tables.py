"""One open file to rows: JSON lines, JSON, CSV, TSV, Parquet, Arrow and plain lines.

Every reader is a generator: it holds one row (JSON: the text of one file; Parquet and Arrow: one batch of rows) at a
time. A row that cannot be read is yielded as its error, and reading goes on; what leaves the rest of a file unreadable
is raised.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import IO, Any

from data_prep.core.errors import UserError, said_by
from data_prep.sources.json_rows import read_json, read_jsonl
from data_prep.sources.rows import BOM, BROKEN, Row, RowOrProblem, bad_byte, empty, short

_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}
_BATCH = 1000
_LOOKED_AT = 200
"""Lines of a TSV that tell whether its fields are quoted."""
_SEPARATOR = re.compile(r"sep=([,;|\t])\s*")
_NUMBER = re.compile(r"[-+]?[\d.,]+(?:[eE][-+]?\d+)?")
Reader = Callable[[str, IO[bytes]], Iterator[RowOrProblem]]


# ------------------------------------------------------------------------------------------------------------ tables
def _table(path: str, lines: Iterable[str], delimiter: str, quotes: bool = True) -> Iterator[RowOrProblem]:
    """The rows of a table from its lines; `quotes`: whether fields may stand in them."""
    csv.field_size_limit(2**31 - 1)
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    records = csv.reader(lines, strict=True, delimiter=delimiter, quoting=quoting)  # type: ignore[arg-type]
    header = _header(path, records, delimiter)
    nameless = [at for at, name in enumerate(header) if not name] if header.count("") > 1 else []
    header = [name for at, name in enumerate(header) if at not in nameless]
    number = 0
    while header:
        try:
            record = next(records, None)
        except csv.Error as problem:
            number += 1
            cut = "unexpected end" in str(problem)  # the quote has swallowed rows of unknown number
            wrong = UserError(
                f"broken quoting: {problem} (got an odd quote; expected quotes around whole fields, doubled inside)"
                + (": the rest cannot be read" if cut else ""),
                code="broken_file" if cut else "bad_row",
                file=path,
                row=number,
            )
            if cut:
                raise wrong from problem
            yield wrong
            continue
        if record is None:
            break
        if not record or (len(record) == 1 < len(header) and not record[0].strip()):
            continue
        number += 1
        wrong_column = next((at for at in nameless if at < len(record) and record[at].strip()), None)
        if wrong_column is not None:
            yield UserError(
                f"a value under a column without a name (got {short(record[wrong_column])!r} in column "
                f"{wrong_column + 1}; expected nothing, or a name in the header)",
                code="bad_row",
                file=path,
                row=number,
            )
            continue
        record = [value for at, value in enumerate(record) if at not in nameless] if nameless else record
        yield _wrong_in(path, number, record, header, quotes=quotes) or Row(
            path, number, dict(zip(header, record, strict=True))
        )
    if header and not number:
        raise empty(path, " (a header without rows)")


def _wrong_in(path: str, number: int, record: list[str], header: list[str], *, quotes: bool) -> UserError | None:
    """What is wrong with a record of a table; `quotes`: whether fields may stand in them."""
    bad = next(((at, found) for at, value in enumerate(record) if (found := BROKEN.search(value))), None)
    if bad:
        return bad_byte(path, number, bad[1][0], header[bad[0]] if bad[0] < len(header) else None)
    if len(record) != len(header):
        return UserError(
            f"{'short' if len(record) < len(header) else 'long'} row (got {len(record)} fields; "
            f"expected {len(header)}: {', '.join(header)})",
            code="bad_row",
            file=path,
            row=number,
        )
    quoted = [] if quotes else [at for at, value in enumerate(record) if _quoted(value)]
    if quoted:
        return UserError(
            f"a quoted field (got {short(record[quoted[0]])}; expected no quoting in .tsv)",
            code="bad_row",
            hint="save it as .csv",
            file=path,
            row=number,
            field=header[quoted[0]],
        )
    return None


def _quoted(field: str) -> bool:
    """Whether a field stands in quotes and has doubled ones inside, as other programs write tables."""
    inside = field[1:-1]
    return field[:1] == '"' == field[-1:] and '""' in inside and '"' not in inside.replace('""', "")


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
        if bad := BROKEN.search(name):
            raise bad_byte(path, None, bad[0], "header")
    header = [name.strip() for name in header]
    twice = [name for name in header if name and header.count(name) > 1]
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
            f"expected {_DELIMITERS[delimiter]})",
            code="bad_header",
            hint="save it as comma-separated .csv or tab-separated .tsv",
            file=path,
        )
    return header


def read_csv(path: str, file: IO[bytes]) -> Iterator[RowOrProblem]:
    """Comma-separated records with a header (RFC 4180); a first line `sep=;`, as Excel has it, names another sign."""
    with _text(file) as text:
        first = next(text, "")
        named = _SEPARATOR.fullmatch(first)
        yield from _table(path, text if named else chain([first], text), named[1] if named else ",")


def read_tsv(path: str, file: IO[bytes]) -> Iterator[RowOrProblem]:
    """Tab-separated lines with a header; quotes are ordinary signs, unless every field of the first lines has them."""
    with _text(file) as text:
        first = list(islice(text, _LOOKED_AT))
        yield from _table(path, chain(first, text), "\t", quotes=_all_quoted(first[1:]))


@contextmanager
def _text(file: IO[bytes]) -> Iterator[io.TextIOWrapper]:
    """The lines of a table, with their ends; bytes that are not UTF-8 as surrogates."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        yield text
    finally:
        text.detach()


def _all_quoted(lines: Sequence[str]) -> bool:
    """Whether every field that is neither empty nor a number stands in quotes, the first of any number of lines."""
    fields = [field for line in lines for field in line.rstrip("\r\n").split("\t")]
    worded = [field for field in fields if field and not _NUMBER.fullmatch(field)]
    return bool(worded) and all(
        len(field) > 1 and field[0] == '"' == field[-1] and '"' not in field[1:-1].replace('""', "") for field in worded
    )


# ------------------------------------------------------------------------------------------------------------ others
def read_text(path: str, file: IO[bytes]) -> Iterator[RowOrProblem]:
    """One row {"text"} per line that is not blank."""
    for number, raw in enumerate(file, start=1):
        line = (raw.removeprefix(BOM) if number == 1 else raw).removesuffix(b"\n").removesuffix(b"\r")
        if not line.strip():
            continue
        try:
            yield Row(path, number, {"text": line.decode("utf-8")})
        except UnicodeDecodeError as problem:
            yield bad_byte(path, number, line[problem.start])


def read_parquet(path: str, file: IO[bytes]) -> Iterator[RowOrProblem]:
    """The records of a Parquet file, a batch at a time."""

    def opened() -> tuple[Any, Iterator[Any]]:
        import pyarrow.parquet as parquet

        table = parquet.ParquetFile(file)
        return table.schema_arrow, table.iter_batches(batch_size=_BATCH)

    return _columnar(path, "Parquet", opened)


def read_arrow(path: str, file: IO[bytes]) -> Iterator[RowOrProblem]:
    """The records of an Arrow file or stream (`datasets.save_to_disk` writes streams), a batch at a time."""

    def opened() -> tuple[Any, Iterator[Any]]:
        import pyarrow as pa

        if file.read(6) == b"ARROW1":
            found = pa.ipc.open_file(file)
            return found.schema, map(found.get_batch, range(found.num_record_batches))
        file.seek(0)
        stream = pa.ipc.open_stream(file)
        return stream.schema, iter(stream)

    return _columnar(path, "Arrow", opened)


def _columnar(path: str, kind: str, opened: Callable[[], tuple[Any, Iterator[Any]]]) -> Iterator[RowOrProblem]:
    """The records of batches of columns; `opened` gives the schema and the batches."""
    import pyarrow

    number = 0
    try:
        schema, batches = opened()
        names = schema.names
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(
                f"names the column '{twice}' twice (got {', '.join(names)}; expected different names)",
                code="bad_header",
                file=path,
                field=twice,
            )
        for whole in batches:
            for start in range(0, whole.num_rows, _BATCH):
                for row in _records(path, number, whole.slice(start, _BATCH)):
                    number += 1
                    yield row
    except (pyarrow.ArrowException, OSError, RecursionError) as problem:
        what = f"is not a{' whole' if number else 'n' if kind[0] == 'A' else ''} {kind} file"
        raise UserError(
            f"{what}: {said_by(problem)}", code="bad_file", file=path, row=number + 1 if number else None
        ) from problem
    if not number:
        raise empty(path, " (no rows)")


def _records(path: str, before: int, batch: Any) -> Iterator[RowOrProblem]:
    """The rows of a record batch; what Python cannot hold (text that is not UTF-8, the year 300000) is found by row."""
    try:
        values = batch.to_pylist()
    except (ValueError, OverflowError):  # UnicodeDecodeError is one
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
            yield bad_byte(path, number, problem.object[problem.start], field)
        except (ValueError, OverflowError) as problem:
            yield UserError(
                f"cannot be read: {said_by(problem)} (got {batch.column(field).type}; expected a value of it)",
                code="bad_row",
                file=path,
                row=number,
                field=field,
            )
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
    ".arrow": read_arrow,
    ".feather": read_arrow,
}
WHOLE = (".parquet", ".arrow", ".feather")
"""Kinds that are read from places anywhere in the file."""
