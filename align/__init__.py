"""Align language models: supervised tuning, reward models and PPO with any adapter, chained through checkpoints.

    config = align.compose(["pipeline=sft", "adapter=vera"])
    record = align.run(config)
    model, tokenizer = align.load(record["name"])

Names are imported when they are first used, so that `import align` costs nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

_PLACES = {
    "compose": "align.config.compose",
    "RunConfig": "align.config.schema",
    "run": "align.pipeline",
    "load": "align.inference.stock",
    "score": "align.inference.stock",
    "Checkpoint": "align.checkpoints.checkpoint",
    "Adapter": "align.adapters.base",
    "adapter": "align.adapters.base",
    "Stage": "align.stages.base",
    "stage": "align.stages.base",
    "UserError": "data_prep.core.errors",
    "option": "data_prep.core.options",
}

__all__ = [
    "Adapter",
    "Checkpoint",
    "RunConfig",
    "Stage",
    "UserError",
    "adapter",
    "check",
    "compose",
    "export",
    "load",
    "merge",
    "option",
    "run",
    "score",
    "stage",
]


def check(words: Sequence[str] = ()) -> dict[str, Any]:
    """What a run would do and what is wrong with it, as `align check --json` says it; nothing is trained.

        found = align.check(["pipeline=sft", "adapter=vera"])
        assert found["ok"], found["problems"]

    Args:
        words: overrides as on the command line.

    Raises:
        UserError: the words make no run.
    """
    from align.config.compose import compose
    from align.planning.check import check as look

    return look(compose(list(words))).as_dict()


def merge(target: str, to: str, force: bool = False, **options: Any) -> dict[str, Any]:
    """Fold a checkpoint into one set of weights that any tool loads, as `align merge` does.

        written = align.merge("my-run/sft", to="merged")
        assert written["drift"]["kl"] < 1e-5

    Args:
        target: a path, RUN or RUN/STAGE.
        to: the folder to write; it must not exist yet.
        force: write it although it differs more from what was trained than `max_kl` allows.
        options: those of `align merge`: load, max_kl, out.

    Returns:
        What was written (`out`), and how far it is from what was trained (`drift`: max_logit, kl in nats per token,
        argmax_agreement), measured on the folder as stock transformers opens it.

    Raises:
        UserError: the method cannot be merged, the folder exists, or the drift exceeds its bound.
    """
    from align.weights.merge import merge as write
    from align.weights.options import MergeOptions
    from data_prep.core.options import build

    return write(target, build(MergeOptions, {"to": to, **options}, ""), force)


def export(target: str, to: str, force: bool = False, **options: Any) -> dict[str, Any]:
    """Write a checkpoint in the form that another tool loads, as `align export` does.

        written = align.export("my-run/reward_model", to="classifier", form="sequence_classification")

    Args:
        target: a path, RUN or RUN/STAGE.
        to: the folder to write; it must not exist yet.
        force: write it although it differs more from what was trained than `max_kl` allows.
        options: those of `align export`: form, load, max_kl, out.

    Returns:
        As `merge` does.

    Raises:
        UserError: the checkpoint cannot have that form, the folder exists, or the drift exceeds its bound.
    """
    from align.weights.export import export as write
    from align.weights.options import ExportOptions
    from data_prep.core.options import build

    return write(target, build(ExportOptions, {"to": to, **options}, ""), force)


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("align-toolkit")
    if name not in _PLACES:
        raise AttributeError(f"module 'align' has no attribute '{name}'")
    return getattr(importlib.import_module(_PLACES[name]), name)
