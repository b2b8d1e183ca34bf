"""Writing so that a reader sees the old state or the new one, never half of it: stage aside, sync, rename."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from data_prep.core.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text through a temporary file and a rename, so that a reader sees the old file or the new one.

    Raises:
        OSError: it cannot be written; nothing is left but what was there.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staging.write_text(text, encoding="utf-8")
        sync(staging)
        os.replace(staging, path)
    except OSError:
        staging.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON as `write_text` does.

    Raises:
        UserError: it cannot be written.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"cannot write ({error.strerror or error})", code="cannot_write", file=str(path)) from None


def json_lines(path: Path) -> list[Any]:
    """The values of a file of JSON lines that this project has written.

    A line ends at a line feed alone: texts in it may hold other characters at which `str.splitlines` cuts (U+2028).
    """
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(staging: Path, final: Path) -> None:
    """Move a complete staging folder to its name in one rename; a folder already there is kept under `.archive/`."""
    readable(staging)
    if final.exists():
        archive = final.parent / ".archive"
        archive.mkdir(exist_ok=True)
        number = 1 + sum(1 for p in archive.iterdir() if p.name.startswith(final.name + "-"))
        os.replace(final, archive / f"{final.name}-{number}")
    os.replace(staging, final)
    sync(final.parent)


def readable(folder: Path) -> None:
    """Give every file the mode that the umask asks for: some libraries write theirs for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)


def clear_staging(staging: Path) -> Path:
    """An empty staging folder; what an interrupted run left there was never published.

    Raises:
        UserError: no folder can be made there.
    """
    if staging.exists():
        shutil.rmtree(staging)
    try:
        staging.mkdir(parents=True)
    except (FileNotFoundError, NotADirectoryError) as problem:  # /proc, a file among its parents
        said = f"no folder can be made here: {problem.strerror}"
        raise UserError(said, file=str(staging.parent), code="output") from problem
    return staging
