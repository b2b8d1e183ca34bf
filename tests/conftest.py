"""What makes all tests cheaper: no compiler is loaded, and garbage is not looked for among the libraries."""

from __future__ import annotations

import gc
import os
import sys

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # as the command line does

MANY = 30
"""New modules that are worth a collection of their own."""
_known = 0


def pytest_runtest_setup() -> None:
    """Take what was imported since out of every later collection: one ends each stage, and libraries are no garbage."""
    global _known
    if len(sys.modules) >= _known + MANY:
        gc.collect()
        gc.freeze()
        _known = len(sys.modules)
