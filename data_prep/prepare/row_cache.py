"""The cache of rendered rows: a folder per key, complete or not there at all.

The key is a hash of everything that decides the rows: the content of the data, the options, tokenizer, template, the
code of this package and the versions of the libraries that it renders with. Where nothing can be kept (no room, rows
whose content is not known beforehand), rows lie in a temporary folder that goes with the process.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
import uuid
import weakref
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from data_prep.core.cache_folder import cache_folder

T = TypeVar("T")

MOST_BYTES = 20 << 30
"""The cache keeps at most this, unless ALIGN_CACHE_GB says otherwise; what was not used for longest goes first."""
_STALE = 24 * 3600.0


@lru_cache
def code_digest() -> str:
    """Hex hash of what turns bytes into rows: this package's files, and the versions of the libraries it uses."""
    return digest_of_package(Path(__file__).parent.parent)


def digest_of_package(folder: Path) -> str:
    """Hex hash of a package's code and YAML data, and of the versions of the libraries that render rows."""
    from importlib.metadata import version

    total = hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.yaml")]):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    for name in ("transformers", "tokenizers", "jinja2", "numpy", "pyarrow"):
        total.update(f"{name} {version(name)}\0".encode())
    return total.hexdigest()


class Kept:
    """The place of one set of rows.

    Args:
        key: hash of what decides the rows, None: nothing is kept.
    """

    def __init__(self, key: str | None) -> None:
        self._final = cache_folder() / "rows" / key if key else None
        self._making: Path | None = None

    def found(self, load: Callable[[Path], T]) -> T | None:
        """The rows made earlier, if there are any; a damaged folder is removed."""
        if self._final is None or not self._final.is_dir():
            return None
        try:
            os.utime(self._final)
            return load(self._final)
        except (OSError, ValueError, KeyError):
            shutil.rmtree(self._final, ignore_errors=True)
            return None

    def folder(self) -> Path:
        """A new folder to write into."""
        if self._final is not None:
            try:
                self._final.parent.mkdir(parents=True, exist_ok=True)
                _tidy(self._final.parent)
                self._making = self._final.parent / f".{self._final.name}.{uuid.uuid4().hex[:8]}"
                self._making.mkdir()
                return self._making
            except OSError:
                self._final = None
        self._making = Path(tempfile.mkdtemp(prefix="align-rows-"))
        return self._making

    def publish(self) -> Path:
        """Make the written folder the kept one, at once; returns where it lies now."""
        assert self._making is not None
        if self._final is None:
            weakref.finalize(_forever, shutil.rmtree, self._making, True)
            return self._making
        try:
            os.rename(self._making, self._final)
        except OSError:  # another process was faster: the same rows
            shutil.rmtree(self._making, ignore_errors=True)
        return self._final

    def drop(self) -> None:
        """Remove what was written and not published."""
        if self._making is not None:
            shutil.rmtree(self._making, ignore_errors=True)

    def forget(self) -> None:
        """Keep nothing: the data changed on the way."""
        self._final = None


class _Forever:
    """Lives as long as the process; temporary folders go with it."""


_forever = _Forever()


def _tidy(folder: Path) -> None:
    """Remove what killed processes left, and the least used rows beyond the limit."""
    most = float(os.environ.get("ALIGN_CACHE_GB") or MOST_BYTES / 2**30) * 2**30
    entries = []
    for entry in folder.iterdir():
        used = entry.stat().st_mtime
        if entry.name.startswith("."):
            if time.time() - used > _STALE:
                shutil.rmtree(entry, ignore_errors=True)
            continue
        entries.append((used, sum(file.stat().st_size for file in entry.iterdir()), entry))
    total = sum(size for _, size, _ in entries)
    for _, size, entry in sorted(entries, key=lambda one: one[0]):
        if total <= most:
            break
        shutil.rmtree(entry, ignore_errors=True)
        total -= size


def stamps(paths: list[str]) -> list[Any]:
    """Size, time of change and inode of files: whether they changed between two looks."""
    found = []
    for path in paths:
        status = os.stat(path)
        found.append([path, status.st_size, status.st_mtime_ns, status.st_ino])
    return found
