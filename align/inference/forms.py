"""In which forms other tools can have a checkpoint, and why not in the others: decided here for `align export` and
`align.load`."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from align.inference.loaded import Opened


class Form(Enum):
    """What `align export` can write."""

    peft = "peft"
    lora = "lora"
    merged = "merged"
    sequence_classification = "sequence_classification"


def against(opened: Opened) -> dict[Form, str | None]:
    """Form -> why this checkpoint cannot have it, or None."""
    checkpoint, traits = opened.checkpoint, opened.adapter.traits
    head = f"a {checkpoint.record['role']} model has a head, which that form would lose"
    whole = "it is a whole model already" if traits.owns_weights else None
    no_weights, no_sum = f"{checkpoint.method} is no change of weights", "its change is no low-rank sum"
    if traits.reads_features:
        no_weights = no_sum = "it depends on each row's features: features=... fixes them, where nothing is shifted"
    merge = whole or (None if traits.mergeable else no_weights)
    below = None
    if checkpoint.record.get("derived_base"):
        below = "it stands on weights that exist in this chain only"
    stacked = "it is stacked on its parent's adapter" if opened.bases.terms_under(checkpoint, opened.load) else None
    speaks = head if checkpoint.record.get("head") else None
    return {
        Form.sequence_classification: None if speaks and not (merge and not whole) else "it has no head",
        Form.peft: speaks or whole or below or stacked or (None if traits.portable else "stock peft lacks the method"),
        Form.lora: speaks or whole or below or (None if traits.low_rank else no_sum),
        Form.merged: speaks or merge,
    }
