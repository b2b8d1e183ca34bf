"""Files to rows with provenance. Strict: a row is read exactly as written, or named with what is wrong in it.

JSONL, JSON arrays, CSV, TSV, Parquet and plain text lines, each also gzip'd; one file, a folder, a glob, or the id of
a data set on the Hugging Face hub. Rows count from 1: lines of JSONL and text, records of the others. A byte-order
mark, CRLF, blank lines and a missing last newline are fine.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError, nearest

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One record as read: `data` maps columns to values; `file` and `row` say where it stood."""

    file: str
    row: int
    data: dict[str, Any]

    @property
    def id(self) -> str:
        """`file:row`."""
        return f"{self.file}:{self.row}"

    def problem(self, field: str | None, message: str, code: str = "bad_row") -> UserError:
        """An error that names this row."""
        return UserError(message, code=code, file=self.file, row=self.row, field=field)


RowOrProblem = Row | UserError


def suffix_of(path: str) -> tuple[str, bool]:
    """(kind of file such as ".jsonl", whether it is gzip'd); the kind is "" when unknown."""
    name = os.path.basename(path).lower()
    zipped = name.endswith(".gz")
    end = os.path.splitext(name.removesuffix(".gz"))[1]
    return (end if end in SUFFIXES else ""), zipped


def resolve(path: str, root: str | None = None) -> str:
    """A path against the root folder (if relative) with `~` opened."""
    path = os.path.expanduser(path)
    return os.path.join(root, path) if root and not os.path.isabs(path) else path


def is_hub_id(path: str) -> bool:
    """Whether a path that is not on this machine looks like a hub id: org/name, no such folder, no data suffix."""
    return bool(_HUB_ID.fullmatch(path)) and not suffix_of(path)[0] and not os.path.isdir(path.split("/")[0])


def find_files(path: str) -> list[str]:
    """The data files that a file, folder or glob stands for, sorted.

    Raises:
        UserError: there are none; the nearest existing name is offered.
    """
    if os.path.isdir(path):
        found = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(path)
            for name in names
            if suffix_of(name)[0] and not name.startswith(".")
        ]
        if not found:
            raise UserError(f"no data file in this folder (expected {_kinds()})", code="no_file", file=path)
        return sorted(found)
    if os.path.exists(path):
        if not suffix_of(path)[0]:
            raise UserError(f"unknown kind of file (expected {_kinds()}, also with .gz)", code="file_kind", file=path)
        return [path]
    if any(sign in path for sign in "*?["):
        found = sorted(name for name in glob.glob(path, recursive=True) if suffix_of(name)[0] and os.path.isfile(name))
        if not found:
            raise UserError("no data file matches this pattern", code="no_file", file=path)
        return found
    raise _missing(path)


def _kinds() -> str:
    return ", ".join(SUFFIXES)


def _missing(path: str) -> UserError:
    """The error for a path that does not exist, with the nearest name beside it."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        return UserError(f"no such file or folder ({folder} does not exist either)", code="no_file", file=path)
    near = nearest(os.path.basename(path), os.listdir(folder))
    guess = f" (did you mean '{os.path.join(os.path.dirname(path), near)}'?)" if near else ""
    return UserError(f"no such file or folder{guess}", code="no_file", file=path)


def read_bytes(path: str) -> bytes:
    """The content of a file, unzipped.

    Raises:
        UserError: it cannot be read, or its gzip stream is broken or cut off.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
        return gzip.decompress(content) if suffix_of(path)[1] else content
    except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
        raise UserError(f"is not a whole gzip file ({problem})", code="bad_file", file=path) from problem
    except OSError as problem:
        raise UserError(f"cannot be read: {problem.strerror or problem}", code="bad_file", file=path) from problem


def read_file(path: str) -> Iterator[RowOrProblem]:
    """The rows of one file, and in place of a row that cannot be read its error.

    Raises:
        UserError: the file as a whole cannot be read, or is empty.
    """
    kind, _ = suffix_of(path)
    content = read_bytes(path)
    if kind != ".parquet" and not content.removeprefix(_BOM).strip():
        raise UserError("is empty", code="empty_file", file=path)
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError("is UTF-16 (expected UTF-8)", code="encoding", file=path)
    content = content.removeprefix(_BOM)
    if kind == ".json" and content.lstrip()[:1] == b"{":
        kind = ".jsonl"
    return _READERS[kind](path, content)


def _lines(path: str, content: bytes) -> Iterator[tuple[int, str] | UserError]:
    """(line number, text) of lines that are not blank; a line that is not UTF-8 gives an error."""
    for number, raw in enumerate(content.split(b"\n"), start=1):
        raw = raw.removesuffix(b"\r")
        if not raw.strip():
            continue
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError as problem:
            yield UserError(
                f"invalid UTF-8 (got byte 0x{raw[problem.start]:02x} at byte {problem.start + 1}; expected UTF-8 text)",
                code="encoding",
                file=path,
                row=number,
            )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's pairs; a key that stands twice is refused, as one value would silently win."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key '{next(key for key in keys if keys.count(key) > 1)}' stands twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)


def _jsonl(path: str, content: bytes) -> Iterator[RowOrProblem]:
    if content.lstrip()[:1] == b"[":
        raise UserError("holds an array (expected one JSON object per line)", hint="call it .json", file=path)
    for line in _lines(path, content):
        if isinstance(line, UserError):
            yield line
            continue
        number, text = line
        try:
            value = _parse(text)
        except (ValueError, RecursionError) as problem:
            at = f"{problem.msg} at column {problem.colno}" if isinstance(problem, json.JSONDecodeError) else problem
            yield UserError(
                f"invalid JSON: {at} (got {_short(text)}; expected one JSON object)",
                code="bad_json",
                file=path,
                row=number,
            )
            continue
        yield _as_row(path, number, value)


def _json(path: str, content: bytes) -> Iterator[RowOrProblem]:
    try:
        value = _parse(content.decode("utf-8"))
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise UserError(f"invalid UTF-8 in line {line} (expected UTF-8 text)", code="encoding", file=path) from problem
    except json.JSONDecodeError as problem:
        raise UserError(
            f"invalid JSON: {problem.msg} at line {problem.lineno}, column {problem.colno} (expected an array)",
            code="bad_json",
            file=path,
        ) from problem
    except (ValueError, RecursionError) as problem:
        raise UserError(f"invalid JSON: {problem}", code="bad_json", file=path) from problem
    if not isinstance(value, list):
        raise UserError(f"holds {_kind(value)} (expected an array of objects)", code="bad_json", file=path)
    if not value:
        raise UserError("is empty (an array without rows)", code="empty_file", file=path)
    for number, item in enumerate(value, start=1):
        yield _as_row(path, number, item)


def _as_row(path: str, number: int, value: Any) -> RowOrProblem:
    if isinstance(value, dict):
        return Row(path, number, value)
    return UserError(
        f"is not an object (got {_kind(value)} {_short(json.dumps(value))}; expected an object with named columns)",
        code="bad_row",
        file=path,
        row=number,
    )


def _table(path: str, content: bytes, **dialect: Any) -> Iterator[RowOrProblem]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as problem:
        row = max(1, content.count(b"\n", 0, problem.start))
        raise UserError(
            f"invalid UTF-8 (got byte 0x{content[problem.start]:02x}; expected UTF-8 text)",
            code="encoding",
            file=path,
            row=row,
        ) from problem
    csv.field_size_limit(2**31 - 1)
    records = csv.reader(io.StringIO(text, newline=""), **dialect)
    header = next((record for record in records if record), [])
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise UserError(f"the header names the column '{twice[0]}' twice", code="bad_header", file=path, field=twice[0])
    number = 0
    try:
        for record in records:
            if not record:
                continue
            number += 1
            if len(record) != len(header):
                yield UserError(
                    f"{'short' if len(record) < len(header) else 'long'} row (got {len(record)} fields; "
                    f"expected {len(header)}: {', '.join(header)})",
                    code="bad_row",
                    file=path,
                    row=number,
                )
            else:
                yield Row(path, number, dict(zip(header, record, strict=True)))
    except csv.Error as problem:
        raise UserError(f"broken quoting: {problem}", code="bad_row", file=path, row=number + 1) from problem
    if not number:
        raise UserError("is empty (a header without rows)", code="empty_file", file=path)


def _csv(path: str, content: bytes) -> Iterator[RowOrProblem]:
    return _table(path, content, strict=True)


def _tsv(path: str, content: bytes) -> Iterator[RowOrProblem]:
    return _table(path, content, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)


def _text(path: str, content: bytes) -> Iterator[RowOrProblem]:
    for line in _lines(path, content):
        yield line if isinstance(line, UserError) else Row(path, line[0], {"text": line[1]})


def _parquet(path: str, content: bytes) -> Iterator[RowOrProblem]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(io.BytesIO(content))
    except (pyarrow.ArrowException, OSError) as problem:
        raise UserError(f"is not a Parquet file: {problem}", code="bad_file", file=path) from problem
    if not table.num_rows:
        raise UserError("is empty (no rows)", code="empty_file", file=path)
    for number, value in enumerate(table.to_pylist(), start=1):
        yield Row(path, number, value)


_READERS: dict[str, Callable[[str, bytes], Iterator[RowOrProblem]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".txt": _text,
    ".parquet": _parquet,
}


def _kind(value: Any) -> str:
    """JSON's word for the type of a value."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _short(text: str, length: int = 40) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def read_hub(name: str) -> Iterator[RowOrProblem]:
    """The rows of a hub data set: its train split, or its only one. Never runs code that comes with the data.

    Raises:
        UserError: the hub or the data set cannot be reached, or it has several splits and none is called train.
    """
    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.ERROR)  # the client's retries would be many lines; the last word is the error below
    try:
        import datasets

        found = datasets.load_dataset(name)
    except Exception as problem:
        reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise UserError(
            f"cannot reach the hub for '{name}': {_short(reason, 120)} (save it as JSONL and give the path)",
            code="hub",
        ) from problem
    finally:
        client.setLevel(level)
    splits = list(found)
    split = "train" if "train" in splits else splits[0]
    if split != "train" and len(splits) > 1:
        raise UserError(f"has no train split (it has {', '.join(splits)}; save one as JSONL)", code="hub", file=name)
    for number, value in enumerate(found[split], start=1):
        yield Row(name, number, dict(value))


def read_path(path: str, root: str | None = None) -> Iterator[RowOrProblem]:
    """The rows of a file, folder, glob or hub id, in a fixed order.

    Raises:
        UserError: nothing is there, or a file as a whole cannot be read.
    """
    where = resolve(path, root)
    if not os.path.exists(where) and is_hub_id(path):
        yield from read_hub(path)
        return
    for file in find_files(where):
        yield from read_file(file)


def digest_path(path: str, root: str | None = None) -> str:
    """Hex sha256 of the content behind a path: names inside the folder and bytes of each file; a hub id by name."""
    where = resolve(path, root)
    total = hashlib.sha256()
    if not os.path.exists(where) and is_hub_id(path):
        total.update(f"hub:{path}".encode())
        return total.hexdigest()
    folder = where if os.path.isdir(where) else os.path.dirname(where)
    for file in find_files(where):
        total.update(Path(os.path.relpath(file, folder or ".")).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(read_bytes(file)).digest())
    return total.hexdigest()
