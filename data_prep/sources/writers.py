"""Rows to JSONL files: whole or not at all, and never over a file that is there."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from data_prep.core.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz")


class RowWriter:
    """Writes rows, one JSON object a line, UTF-8."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.rows = 0

    def write(self, row: dict[str, Any]) -> None:
        """Write one row."""
        self._file.write(json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n")
        self.rows += 1


def check_new(path: str) -> None:
    """Refuse a path that cannot be written: it exists, its folder does not, or it is no JSONL file.

    Raises:
        UserError: with what to do instead.
    """
    if path == "-":
        return
    if not path.endswith(SUFFIXES):
        raise UserError("what is written is JSONL (expected FILE.jsonl, FILE.jsonl.gz or -)", file=path, code="to")
    if os.path.lexists(path):
        raise UserError("exists already (expected a new file)", file=path, code="exists", hint="name another file")
    if not Path(path).parent.is_dir():
        raise UserError("its folder does not exist", file=path, code="to", hint="make the folder first")


def _begun(part: Path) -> BinaryIO:
    try:
        return part.open("xb")
    except OSError as problem:
        said = problem.strerror or str(problem)
        raise UserError(f"cannot be written: {said}", file=str(part.parent), code="to") from problem


@contextlib.contextmanager
def row_writer(path: str) -> Iterator[RowWriter]:
    """A writer of rows to a new file, gzip'd by its name; "-" is standard output.

    The rows go to a hidden file beside it, which takes the name when all went well and is removed when not.

    Raises:
        UserError: the path cannot be written, or the file appeared meanwhile.
    """
    check_new(path)
    if path == "-":
        yield RowWriter(sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return
    final = Path(path)
    part = final.with_name(f".{final.name}.{os.getpid()}.part")
    begun = _begun(part)
    try:
        with begun as file:
            if path.endswith(".gz"):  # no name and time inside: the same rows give the same bytes
                with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as zipped, io.BufferedWriter(zipped) as buffer:
                    yield RowWriter(buffer)
            else:
                yield RowWriter(file)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(part, final)  # unlike a rename, a link is never put over a file
        except FileExistsError:
            check_new(path)
            raise
        except OSError:  # a file system without links
            check_new(path)
            os.replace(part, final)
    finally:
        part.unlink(missing_ok=True)
