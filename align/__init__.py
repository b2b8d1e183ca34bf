"""Align language models: supervised tuning, reward models and PPO with any adapter, chained through checkpoints.

    config = align.compose(["pipeline=sft", "adapter=vera"])
    record = align.run(config)

Names are imported when they are first used, so that `import align` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

_PLACES = {
    "compose": "align.config.compose",
    "RunConfig": "align.config.schema",
    "run": "align.pipeline",
    "Checkpoint": "align.checkpoints.checkpoint",
    "Adapter": "align.adapters.base",
    "adapter": "align.adapters.base",
    "Stage": "align.stages.base",
    "stage": "align.stages.base",
    "UserError": "data_prep.core.errors",
    "option": "data_prep.core.options",
}

__all__ = ["Adapter", "Checkpoint", "RunConfig", "Stage", "UserError", "adapter", "compose", "option", "run", "stage"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module 'align' has no attribute '{name}'")
    return getattr(importlib.import_module(_PLACES[name]), name)
