"""Folders that other tools load: written aside, opened again in stock libraries, compared, then published."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from align.config.schema import Load
from align.inference.loaded import Opened
from align.weights.drift import Drift
from align.weights.options import MergeOptions
from data_prep.core.errors import UserError
from data_prep.core.files import clear_staging, publish, write_json

BOUNDS = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest KL in nats per token that counts as the same model; bf16 rounds every product and weight to 8 bits."""
RECORD = "align_export.json"
"""Where a written folder says what it was made from."""


def bound_for(options: MergeOptions, opened: Opened) -> float:
    """The largest KL allowed: as asked for, else by the coarser of what was trained and what is written."""
    if options.max_kl is not None:
        return options.max_kl
    device = opened.bases.device.type
    return max(BOUNDS[load.computes_in(device)] for load in (options.load, opened.load))


@dataclass
class Written:
    """A folder on its way: what it holds, and how far it is from what was trained."""

    form: str
    to: Path
    bound: float
    force: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    def make(self, opened: Opened, write: Callable[[Path], None], compare: Callable[[Path], Drift]) -> dict[str, Any]:
        """Write, compare and publish; nothing is left when the comparison fails.

        Raises:
            UserError: the KL exceeds the bound and `force` is not set.
        """
        self.to.parent.mkdir(parents=True, exist_ok=True)
        staging = clear_staging(self.to.with_name(f".staging-{self.to.name}"))
        try:
            write(staging)
            drift = compare(staging)
            if not drift.kl <= self.bound and not self.force:
                raise UserError(
                    f"{self.form} differs too much from what was trained: {drift} (bound {self.bound:.0e})",
                    code="drift",
                    hint="keep the adapter beside its base, raise max_kl, or take it all the same with --force",
                )
            record = {
                "form": self.form,
                "of": opened.checkpoint.label,
                "digest": opened.checkpoint.digest,
                "base": opened.checkpoint.record["root"],
                "trained_at": opened.checkpoint.load,
                "drift": drift.as_dict(),
                "forced": not drift.kl <= self.bound,
                **self.notes,
            }
            write_json(staging / RECORD, record)
            publish(staging, self.to)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return {"out": str(self.to), "reloaded_ok": True, **record}


def save_model(model: PreTrainedModel, opened: Opened, folder: Path, load: Load) -> None:
    """A whole model with its tokenizer, as `from_pretrained` of any tool wants it."""
    if load is Load.bf16:
        torch.nn.Module.to(model, torch.bfloat16)
    model.config.use_cache = True
    model.save_pretrained(folder)
    opened.tokenizer.save_pretrained(folder)


def publish_adapter(folder: Path, tokenizer: Any, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Write an adapter folder aside with its tokenizer and record, then give it its name.

    Args:
        folder: the name it gets.
        tokenizer: saved beside the adapter.
        write: writes the adapter into the folder it is given, opens it again, and returns the record to keep.

    Returns:
        The record, `out` and `reloaded_ok`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = clear_staging(folder.with_name(f".staging-{folder.name}"))
    try:
        record = write(staging)
        tokenizer.save_pretrained(staging)
        write_json(staging / RECORD, record)
        publish(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return {"out": str(folder), "reloaded_ok": True, **record}
