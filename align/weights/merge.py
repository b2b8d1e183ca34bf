"""`align merge`: a checkpoint as one set of weights, in a private copy, with what that changed.

A 4-bit base is dequantised first and stays so: merging into 4-bit weights would round them again (measured: KL 9e-2
against 2e-6, argmax agreement 0 against 1 on a random model).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from align.inference.loaded import Opened
from align.weights.drift import Drift, measure, of_model, of_role
from align.weights.options import MergeOptions, place
from align.weights.output import Written, bound_for, save_model
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
    opened = Opened.target(target, options.out)
    opened.require_language_model("merging")
    require_mergeable(opened)
    folder = place(options.to, opened.checkpoint.folder, "merged")
    bound = bound_for(options, opened)
    written = Written("merged", folder, bound, force, {"load": options.load.value})
    return written.make(
        opened,
        lambda staging: save_model(merged_model(opened), opened, staging, options.load),
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
    if not opened.adapter.traits.mergeable:
        raise UserError(
            f"{opened.checkpoint.method} cannot be merged: it is no change of the base's weights",
            code="not_mergeable",
            hint="serve the adapter beside its base: align "
            + ("export form=peft" if opened.adapter.traits.portable else f"chat {opened.checkpoint.folder}"),
        )


def merged_model(opened: Opened) -> PreTrainedModel:
    """The checkpoint's function as plain float32 weights, in a private copy of its base."""
    return opened.bases.folded(opened.checkpoint, opened.load)


def compare_model(opened: Opened, folder: Path) -> Drift:
    """Open a written folder with stock transformers and compare its logits with the trained role's."""
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto")
    torch.nn.Module.to(model, opened.role.tree.device)
    model.eval()
    return measure(of_role(opened.role), of_model(model), opened.rows())
