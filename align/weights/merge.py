"""`align merge`: a checkpoint as one set of weights, in a private copy, with what that changed.

A 4-bit base is dequantised first and stays so: merging into 4-bit weights would round them again (measured: KL 9e-2
against 2e-6, argmax agreement 0 against 1 on a random model).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from align.config.schema import Load
from align.inference.forms import Form, against
from align.inference.loaded import TEXTS, Opened
from align.models.loading import load_weights
from align.models.tokenizer import open_tokenizer
from align.weights.drift import measure, of_model, of_role
from align.weights.options import MergeOptions, place
from align.weights.output import ALONE, PADDED, Compared, Written, bound_for, save_model
from align.weights.padding import SIDES, of_batch, padded_tokenizer
from data_prep.core.errors import UserError


def merge(target: str, options: MergeOptions, force: bool = False) -> dict[str, Any]:
    """Write TARGET as a plain model folder and compare it, opened by stock transformers, with what was trained.

    Returns:
        out, drift (max_logit, kl, argmax_agreement, tokens), reloaded_ok, and what it was made from.

    Raises:
        UserError: the method cannot be merged, the folder exists, or the drift exceeds its bound.
    """
    if options.load.four_bit:
        raise UserError(
            "merging into 4-bit weights would round them again and lose what was trained",
            field="load",
            hint="merge at load=bf16 and let the serving tool quantise",
            code="lossy_merge",
        )
    opened = Opened.target(target, options.out, options.base, options.features)
    opened.require_language_model("merging")
    require_mergeable(opened)
    folder = place(options.to, opened.checkpoint.folder, "merged")
    bound = bound_for(options, opened)
    written = Written("merged", folder, bound, force, {"load": options.load.value})
    return written.make(
        opened,
        lambda staging: write_merged(opened, staging, options.load),
        lambda staging: compare_model(opened, staging),
    )


def require_mergeable(opened: Opened) -> None:
    """Refuse a method whose effect is no change of weights."""
    if opened.adapter.traits.owns_weights:
        raise UserError(
            f"{opened.checkpoint.label} is a whole model already: there is nothing to merge",
            code="not_mergeable",
            hint=f"use {opened.checkpoint.folder}",
        )
    if not opened.adapter.traits.mergeable and opened.adapter.traits.reads_features:
        raise UserError(
            f"{opened.checkpoint.method} cannot be merged: {against(opened)[Form.lora]}", code="not_mergeable"
        )
    if not opened.adapter.traits.mergeable:
        verb = "chat" if against(opened)[Form.peft] else "export"
        raise UserError(
            f"{opened.checkpoint.method} cannot be merged: it is no change of the base's weights",
            code="not_mergeable",
            hint=f"serve the adapter beside its base: align {verb} {opened.checkpoint.folder}",
        )


def merged_model(opened: Opened) -> PreTrainedModel:
    """The checkpoint's function as plain float32 weights, in a private copy of its base."""
    return opened.bases.folded(opened.checkpoint, opened.load)


def write_merged(opened: Opened, folder: Path, load: Load) -> None:
    """The checkpoint as a model folder that can go on from prompts of unequal length, and ends its turn."""
    model, end = merged_model(opened), opened.renderer.end_token_id
    if model.generation_config is not None:
        known = model.generation_config.eos_token_id
        ends = known if isinstance(known, list) else [] if known is None else [known]
        model.generation_config.eos_token_id = ends if end in ends else [*ends, end]
    save_model(model, padded_tokenizer(opened.tokenizer, "left"), folder, load)


def compare_model(opened: Opened, folder: Path) -> Compared:
    """Open a written folder with stock transformers and compare its logits with the trained role's."""
    model, _ = load_weights(folder, dtype="auto")
    torch.nn.Module.to(model, opened.role.tree.device)
    return compare_logits(opened, model, folder)


def compare_logits(opened: Opened, model: Any, folder: Path) -> Compared:
    """A stock model against the trained role: row by row, and prompts by its own tokenizer and template in one batch
    padded on either side. Virtual tokens stand before the padding, so that stock peft cannot pad them on the left."""
    model.eval()
    found = {ALONE: measure(of_role(opened.role), of_model(model), opened.rows())}
    tokenizer = open_tokenizer(folder)
    talks = [[{"role": "user", "content": text}] for text in TEXTS]
    rows = [ids[: opened.room] for ids in tokenizer.apply_chat_template(talks, add_generation_prompt=True)["input_ids"]]
    for side in SIDES[:1] if opened.adapter.traits.soft_prompt else SIDES:
        batched = of_batch(model, tokenizer, rows, side)
        found[PADDED + side] = measure(of_role(opened.role), batched, rows)
    return found
