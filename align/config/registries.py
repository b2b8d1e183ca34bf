"""The names that a configuration may choose from: methods, stages and trackers.

Each is a folder of files that register themselves when they are imported. What stands behind a name is known to the
code that uses it, not here: a configuration asks for names, options and class attributes alone.
"""

from __future__ import annotations

from typing import Any

from data_prep.core.registry import Registry

adapters: Registry[Any] = Registry("adapter", "align.adapters")
stages: Registry[Any] = Registry("stage", "align.stages")
trackers: Registry[Any] = Registry("tracker", "align.tracking.trackers")
