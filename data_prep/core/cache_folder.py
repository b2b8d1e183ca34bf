"""Where prepared rows and other things made once are kept."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from data_prep.core.files import write_text


def cache_folder() -> Path:
    """Where things are kept that can be made again at any time: ALIGN_CACHE, else `align` in the user's cache."""
    own = os.environ.get("ALIGN_CACHE")
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(own) if own else Path(root) / "align"


class Remembered:
    """What was found out by key, in one small JSON file of the cache folder; losing it only costs time."""

    def __init__(self, name: str) -> None:
        self._path = cache_folder() / name

    def get(self, key: str) -> Any:
        """What was put under the key, or None."""
        return self._read().get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep a value; a cache that cannot be written keeps nothing."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._path, json.dumps({**self._read(), key: value}))
        except OSError:
            return

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}
