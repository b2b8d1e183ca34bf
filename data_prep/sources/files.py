"""Files to rows with provenance. Strict: a row is read exactly as written, or named with what is wrong in it.

JSONL, JSON, CSV, TSV, Parquet, Arrow and plain text lines, each also packed; one file, a folder, a glob, or the id of a
data set on the Hugging Face hub. Rows count from 1: lines of JSONL and text, records of the others. A byte-order mark,
CRLF, blank lines and a missing last newline are fine.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from data_prep.core.errors import UserError, nearest
from data_prep.sources.compression import ALSO, BROKEN, PACKED, packing_of, unpacked
from data_prep.sources.hub import read_hub
from data_prep.sources.rows import Row, RowOrProblem, empty
from data_prep.sources.splits import SplitWish, split_of_file
from data_prep.sources.tables import READERS, WHOLE

__all__ = ["Row", "RowOrProblem", "digest_path", "find_files", "is_hub_id", "read_file", "read_path", "resolve"]
SUFFIXES = tuple(READERS)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
_UTF16 = re.compile(rb"\xff\xfe|\xfe\xff|[ -~]\0[ -~]\0|\0[ -~]\0[ -~]")
_MISTAKEN: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "is gzip'd", "let its name end in .gz"),
    (b"\x28\xb5\x2f\xfd", "is packed with zstd", "let its name end in .zst"),
    (b"BZh", "is packed with bzip2", "let its name end in .bz2"),
    (b"\xfd7zXZ", "is packed with xz", "let its name end in .xz"),
    (b"PK\x03\x04", "is a zip archive", "unpack it"),
    (b"PAR1", "is a Parquet file", "let its name end in .parquet"),
    (b"ARROW1", "is an Arrow file", "let its name end in .arrow"),
)
"""First bytes of files that are not what their names say -> what they are, what to do."""
_HEAD, _TAR_AT = 512, 257
"""Bytes that are looked at, and where in a tar archive stands that it is one."""
_LFS = b"version https://git-lfs.github.com/"
_OTHER_KINDS = {
    **dict.fromkeys((".zip", ".7z", ".tar", ".tgz", ".rar"), "unpack it, or pack each file with gzip"),
    **dict.fromkeys((".jsonlines", ".jl"), "let its name end in .jsonl"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save it as .csv"),
    **dict.fromkeys((".orc", ".avro"), "save it as .parquet"),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".npy"), "save it as .jsonl; pickles can run code and are never read"),
}
_NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SIDE = re.compile(r"(train|training)|(test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)


def suffix_of(path: str) -> str:
    """The kind of a file, such as ".jsonl", however it is packed; "" when unknown."""
    name = os.path.basename(path).lower()
    end = os.path.splitext(name.removesuffix(packing_of(name)))[1]
    return end if end in SUFFIXES else ""


def resolve(path: str, root: str | None = None) -> str:
    """A path against the root folder (if relative) with `~` opened."""
    path = os.path.expanduser(path)
    return os.path.join(root, path) if root and not os.path.isabs(path) else path


def is_hub_id(path: str) -> bool:
    """Whether a path that is not on this machine looks like a hub id: org/name or org/name:config, no such folder."""
    return bool(_HUB_ID.fullmatch(path)) and not suffix_of(path) and not os.path.isdir(path.split("/")[0])


def find_files(path: str) -> list[str]:
    """The data files that a file, folder or glob stands for, sorted; each file once, however many links lead to it.

    Raises:
        UserError: there are none; the nearest existing name is offered.
    """
    if os.path.isdir(path):
        names = [name for name in _walk(path) if os.path.basename(name) not in _NO_DATA]
        found = _once(name for name in names if suffix_of(name))
        if not found:
            raise UserError(
                f"no data file in this folder (expected {_kinds()})", code="no_file", hint=_advice(names), file=path
            )
        return found
    if os.path.exists(path):
        if not suffix_of(path):
            got = os.path.splitext(path.lower().removesuffix(packing_of(path)))[1] or "no ending"
            raise UserError(
                f"unknown kind of file (got {got}; expected {_kinds()}, {ALSO})",
                code="file_kind",
                hint=_advice([path]),
                file=path,
            )
        return [path]
    if any(sign in path for sign in "*?["):
        found = _once(name for name in glob.glob(path, recursive=True) if suffix_of(name) and os.path.isfile(name))
        if not found:
            several = "several files are a folder, a glob as 'DIR/*.jsonl', or sources of data.mix"
            raise UserError("no data file matches this pattern", code="no_file", hint=several, file=path)
        return found
    raise _missing(path)


def _walk(folder: str) -> Iterator[str]:
    """Every file below a folder that is not hidden; links to folders are followed, but no folder is entered twice."""
    entered = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_closed):
        kept = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(place, name))
            if not name.startswith(".") and real not in entered:
                entered.add(real)
                kept.append(name)
        folders[:] = kept
        yield from (os.path.join(place, name) for name in names if not name.startswith("."))


def _closed(problem: OSError) -> None:
    """Refuse a folder that cannot be looked into: what it holds would be left out in silence."""
    raise UserError(f"cannot be read: {problem.strerror}", code="bad_file", file=str(problem.filename)) from problem


def _once(names: Iterable[str]) -> list[str]:
    """Sorted names; of several that lead to one file, the first."""
    found: dict[str, str] = {}
    for name in sorted(names):
        found.setdefault(os.path.realpath(name), name)
    return list(found.values())


def _advice(names: Iterable[str]) -> str | None:
    """What to do with files of a kind that is not read, if that is known."""
    ends = (os.path.splitext(name[: len(name) - len(packing_of(name))])[1].lower() for name in names)
    return next((_OTHER_KINDS[end] for end in ends if end in _OTHER_KINDS), None)


def _kinds() -> str:
    return ", ".join(SUFFIXES)


def _missing(path: str) -> UserError:
    """The error for a path that does not exist, with the nearest name beside it."""
    if os.path.islink(path):
        return UserError("is a symbolic link that leads nowhere", code="no_file", file=path)
    if "://" in path:
        return UserError(
            "is an address, and no file is fetched from one",
            code="no_file",
            hint="download it and give its path; a data set of the hub is named ORG/NAME",
            file=path,
        )
    if path == "-":
        hint = "a file may be read more than once: write what comes in to one, and give its path"
        return UserError("standard input is not read", code="no_file", hint=hint, file=path)
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        return UserError(f"no such file or folder ({folder} does not exist either)", code="no_file", file=path)
    near = nearest(os.path.basename(path), os.listdir(folder))
    guess = f" (did you mean '{os.path.join(os.path.dirname(path), near)}'?)" if near else ""
    return UserError(f"no such file or folder{guess}", code="no_file", file=path)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """The file, unpacked as it is read; whatever goes wrong is one line.

    Raises:
        UserError: it cannot be read, what is packed is broken or cut off, or it changed while it was read.
    """
    end = packing_of(path)
    try:
        before = os.stat(path)
        if not stat.S_ISREG(before.st_mode):
            raise UserError("is not an ordinary file", code="bad_file", file=path)
        with open(path, "rb") as plain:
            if end:
                with unpacked(plain, end) as inside:
                    yield inside
            else:
                yield plain
        after = os.stat(path)
    except BROKEN as problem:
        said = problem.strerror if isinstance(problem, OSError) else None
        if end and said is None:
            raise UserError(f"is not a whole {PACKED[end]} file ({problem})", code="bad_file", file=path) from problem
        raise UserError(f"cannot be read: {said or problem}", code="bad_file", file=path) from problem
    if (before.st_size, before.st_mtime_ns, before.st_ino) != (after.st_size, after.st_mtime_ns, after.st_ino):
        raise UserError(
            f"changed while it was read (got {after.st_size} bytes; expected {before.st_size})",
            code="file_changed",
            hint="run again when nothing writes to it",
            file=path,
        )


def read_file(path: str) -> Iterator[RowOrProblem]:
    """The rows of one file, and in place of a row that cannot be read its error.

    Raises:
        UserError: the file as a whole cannot be read, or is empty.
    """
    kind = suffix_of(path)
    nothing = True
    with _opened(path) as file:
        _require_kind(path, kind, file.peek(_HEAD)[:_HEAD])
        seekable = io.BytesIO(file.read()) if kind in WHOLE and packing_of(path) else file
        for row in READERS[kind](path, cast(IO[bytes], seekable)):
            nothing = False
            yield row
    if nothing:
        raise empty(path)


def _require_kind(path: str, kind: str, head: bytes) -> None:
    """Refuse a file whose first bytes are those of another kind.

    Raises:
        UserError: says what it is and what to do.
    """
    what, hint = "", None
    if head.startswith(_LFS):
        what, hint = "is a pointer of Git LFS, not the file itself", "fetch it with `git lfs pull`"
    elif kind != ".txt" and head.lstrip()[:9].lower() in (b"<!doctype", b"<html>", b"<html lan"):
        what, hint = "is a web page (HTML)", "download the file itself"
    elif kind not in WHOLE and _UTF16.match(head):
        what, hint = "is UTF-16", "save it as UTF-8"
    elif kind not in WHOLE and head[_TAR_AT : _TAR_AT + 5] == b"ustar":
        what, hint = "is a tar archive", "unpack it"
    elif kind not in WHOLE:
        what, hint = next(((is_a, do) for magic, is_a, do in _MISTAKEN if head.startswith(magic)), ("", None))
    if what:
        expected = "UTF-8" if "UTF" in what else f"{kind.removeprefix('.')}"
        raise UserError(
            f"{what} (expected {expected})", code="encoding" if "UTF" in what else "bad_file", hint=hint, file=path
        )


def _sides(files: list[str]) -> dict[str, str]:
    """The sides of files that are called, or whose folders are, train and test, valid, dev or eval; {} without both."""
    found = {}
    for file in files:
        folder, name = os.path.split(file)
        if side := _SIDE.match(name) or _SIDE.match(os.path.basename(folder)):
            found[file] = "train" if side[1] else "eval"
    return found if len(set(found.values())) > 1 else {}


def _on_side(row: RowOrProblem, side: str | None) -> RowOrProblem:
    """The row with the side of its file, unless it says one itself."""
    if side is None or not isinstance(row, Row) or row.data.get("split") not in (None, ""):
        return row
    return Row(row.file, row.row, {**row.data, "split": side})


def files_to_read(where: str, wish: SplitWish) -> list[str]:
    """The files of a resolved path that are read: of several splits those that the wish is for.

    Raises:
        UserError: there are none, or the names of the splits do not say which one to read.
    """
    files = find_files(where)
    if len(files) == 1 and wish.name is None:
        return files
    names = {file: _split_of(file) for file in files}
    read = set(wish.of_files(sorted(set(names.values())), where))
    return [file for file in files if names[file] in read]


def _split_of(file: str) -> str:
    folder, name = os.path.split(file)
    plain = name[: len(name) - len(packing_of(name))]
    return split_of_file(os.path.splitext(plain)[0], os.path.basename(folder))


def read_path(path: str, root: str | None = None, wish: SplitWish | None = None) -> Iterator[RowOrProblem]:
    """The rows of a file, folder, glob or hub id, in a fixed order; of several files, names say which evaluate.

    Raises:
        UserError: nothing is there, the splits are several and unclear, or a file as a whole cannot be read.
    """
    where, wish = resolve(path, root), wish or SplitWish()
    if not os.path.exists(where) and is_hub_id(path):
        yield from read_hub(path, wish)
        return
    files = files_to_read(where, wish)
    sides = _sides(files)
    for file in files:
        yield from (_on_side(row, sides.get(file)) for row in read_file(file))


def digest_path(path: str, root: str | None = None, wish: SplitWish | None = None) -> str:
    """Hex sha256 of what is read of a path: names inside the folder and bytes of each file; a hub id by name."""
    where = resolve(path, root)
    total = hashlib.sha256()
    if not os.path.exists(where) and is_hub_id(path):
        total.update(f"hub:{path}".encode())
        return total.hexdigest()
    folder = where if os.path.isdir(where) else os.path.dirname(where)
    for file in files_to_read(where, wish or SplitWish()):
        total.update(Path(os.path.relpath(file, folder or ".")).as_posix().encode() + b"\0")
        with _opened(file) as content:
            digest = hashlib.sha256()
            while block := content.read(1 << 20):
                digest.update(block)
            total.update(digest.digest())
    return total.hexdigest()
