"""How fast rows are read and rendered: a line on stderr every few seconds."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

SECONDS = 10.0


class Pace:
    """Context manager that says how many rows are done, and how many a second, where it takes long.

    Args:
        name: what is read.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._rows = 0
        self._spoke = False

    def __enter__(self) -> Pace:
        self._began = self._told = time.monotonic()
        return self

    def at(self, rows: int) -> None:
        """So many rows are done."""
        self._rows = rows
        if time.monotonic() - self._told >= SECONDS:
            self._tell()

    def _tell(self) -> None:
        self._told, self._spoke = time.monotonic(), True
        if os.environ.get("RANK", "0") == "0":
            speed = self._rows / max(self._told - self._began, 1e-9)
            print(f"data {self._name}: {self._rows:,} rows, {speed:,.0f} rows/s", file=sys.stderr, flush=True)

    def __exit__(self, *_: Any) -> None:
        if self._spoke:
            self._tell()
