"""Folders that other tools load: written aside, opened again in stock libraries, compared, then published."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from align.checkpoints.card import base_name
from align.config.schema import Load
from align.inference.loaded import Opened
from align.weights.card import card_of
from align.weights.drift import Drift
from align.weights.options import MergeOptions
from align.weights.padding import agree, padded_tokenizer
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


Compared = dict[str, Drift]
"""ALONE or PADDED with a side -> how far rows that are computed so are from what was trained."""
Compare = Callable[[Path], Compared]
ALONE, PADDED = "", " in a batch padded on the "


def within(what: str, drift: Drift, bound: float, force: bool, advice: str) -> bool:
    """Whether a drift above the bound was forced through.

    Raises:
        UserError: it is above the bound, and is not forced.
    """
    if not drift.kl <= bound and not force:
        raise UserError(
            f"{what} differs too much from what was trained: {drift} (bound {bound:.0e})",
            code="drift",
            hint=f"{advice}, or take it all the same with --force",
        )
    return not drift.kl <= bound


@dataclass
class Written:
    """A folder on its way: what it holds, and how far it is from what was trained."""

    form: str
    to: Path
    bound: float
    force: bool = False
    notes: dict[str, Any] = field(default_factory=dict)
    more: str = ""
    """What stands at the end of its README."""

    def make(self, opened: Opened, write: Callable[[Path], None], compare: Compare) -> dict[str, Any]:
        """Write, compare row by row and in padded batches, and publish; nothing is left when a comparison fails.

        Raises:
            UserError: a KL exceeds the bound and `force` is not set.
        """
        self.to.parent.mkdir(parents=True, exist_ok=True)
        staging = clear_staging(self.to.with_name(f".staging-{self.to.name}"))
        try:
            write(staging)
            found = compare(staging)
            advice = "keep the adapter beside its base, or raise max_kl"
            forced = [
                within(f"{self.form}{how}", drift, self.bound, self.force, advice) for how, drift in found.items()
            ]
            record = {
                "form": self.form,
                "of": opened.checkpoint.label,
                "digest": opened.checkpoint.digest,
                "base": base_name(str(opened.checkpoint.record["root"])),
                "trained_at": opened.checkpoint.load,
                "drift": found[ALONE].as_dict(),
                "padded": {how.removeprefix(PADDED): drift.as_dict() for how, drift in found.items() if how != ALONE},
                "forced": any(forced),
                **self.notes,
            }
            write_json(staging / RECORD, record)
            (staging / "README.md").write_text(card_of(opened, record) + self.more, encoding="utf-8")
            publish(staging, self.to)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return {"out": str(self.to), "reloaded_ok": True, **record}


def save_model(model: PreTrainedModel, tokenizer: Any, folder: Path, load: Load) -> None:
    """A whole model with its tokenizer, as `from_pretrained` of any tool wants it; they agree on the padding."""
    agree(model, tokenizer)
    if load is Load.bf16:
        torch.nn.Module.to(model, torch.bfloat16)
    model.config.use_cache = True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def publish_adapter(
    folder: Path,
    tokenizer: Any,
    write: Callable[[Path], dict[str, Any]],
    card: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    """Write an adapter folder aside with its tokenizer and record, then give it its name.

    Args:
        folder: the name it gets.
        tokenizer: saved beside the adapter.
        write: writes the adapter into the folder it is given, opens it again, and returns the record to keep.
        card: README.md for a record.

    Returns:
        The record, `out` and `reloaded_ok`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = clear_staging(folder.with_name(f".staging-{folder.name}"))
    try:
        record = write(staging)
        padded_tokenizer(tokenizer, "left").save_pretrained(staging)
        write_json(staging / RECORD, record)
        (staging / "README.md").write_text(card(record), encoding="utf-8")
        publish(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return {"out": str(folder), "reloaded_ok": True, **record}
