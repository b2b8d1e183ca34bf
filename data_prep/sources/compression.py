"""Packed files, read as what they hold; the end of a name says how: gzip, bzip2, xz or zstd."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any

PACKED: dict[str, str] = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
"""End of a name -> how the file is packed."""
ALSO = "also with .gz, .bz2, .xz or .zst"
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading raises; an OSError without words of the system speaks of what is packed."""


def packing_of(path: str) -> str:
    """The end of a name that says how the file is packed; "" if it is not."""
    return next((end for end in PACKED if path.lower().endswith(end)), "")


def unpacked(file: IO[bytes], end: str) -> Any:
    """A buffered reader of what a packed file holds."""
    opening: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}
    return opening[end](file)


def _zstd(file: IO[bytes]) -> io.BufferedReader:
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"))
