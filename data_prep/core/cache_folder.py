"""Where prepared rows and other things made once are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where things are kept that can be made again at any time: ALIGN_CACHE, else `align` in the user's cache."""
    own = os.environ.get("ALIGN_CACHE")
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(own) if own else Path(root) / "align"
