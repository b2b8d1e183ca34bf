"""A checkpoint opened for work outside a run: verified, with the bases it stands on and its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from peft import PeftModel

from align.checkpoints.checkpoint import Checkpoint
from align.checkpoints.compatibility import adapter_of, at_features
from align.checkpoints.resolve import resolve_checkpoint
from align.config.schema import Load
from align.models.fingerprint import base_fingerprint, context_length, read_model_config
from align.models.low_rank import LowRankTerms, combined
from align.models.shared_base import BaseIdentity
from align.models.tokenizer import open_tokenizer
from align.roles import Bases, Role
from data_prep.core.errors import UserError
from data_prep.rendering.renderer import Renderer


@dataclass
class Opened:
    """A checkpoint whose files, parents and base have been checked against their records."""

    checkpoint: Checkpoint
    base_folder: Path
    bases: Bases

    @classmethod
    def target(cls, target: str, out: str, base: str | None = None, features: Any = None) -> Opened:
        """Open TARGET: a path, RUN or RUN/STAGE; whatever does not fit is refused before weights load.

        `base` is the folder of the base where it lies now, if it has moved; `features` are those of every row.
        """
        checkpoint = at_features(resolve_checkpoint(target, out), features)
        folder = checkpoint.base_folder(base)
        checkpoint.require(folder)
        identity = BaseIdentity(str(checkpoint.record["root"]), None, base_fingerprint(folder))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(checkpoint, folder, Bases(folder, identity, device))

    @property
    def load(self) -> Load:
        """Precision at which the checkpoint was trained."""
        return Load(self.checkpoint.load)

    @property
    def adapter(self) -> Any:
        """The checkpoint's method with its options."""
        return adapter_of(self.checkpoint)

    @cached_property
    def role(self) -> Role:
        """The checkpoint as it was trained, frozen."""
        return self.bases.realise(self.checkpoint, self.checkpoint.record["role"], self.load)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the base."""
        return open_tokenizer(self.base_folder)

    @cached_property
    def renderer(self) -> Renderer:
        """The tokenizer with its chat template."""
        return Renderer(self.tokenizer)

    @property
    def context(self) -> int:
        """Longest row in tokens."""
        return context_length(read_model_config(self.base_folder)) or 1024

    @property
    def room(self) -> int:
        """Longest row in tokens beside the virtual ones."""
        return self.context - int(self.adapter.virtual_tokens)

    def rows(self) -> list[list[int]]:
        """Rows to measure drift on: the checkpoint's own probe and neutral texts."""
        return probe_rows(self.tokenizer, self.checkpoint.probe_ids, self.context)

    def terms(self, verb: str) -> LowRankTerms:
        """Everything between the checkpoint and its base as one low-rank term per layer, or a refusal of `verb`."""
        self.require_language_model(verb)
        if not self.adapter.traits.low_rank or self.checkpoint.record.get("derived_base"):
            raise UserError(
                f"{verb} needs a low-rank sum on the base itself, and {self.checkpoint.label} "
                f"({self.checkpoint.method}) is none",
                code="not_low_rank",
                hint="possible for LoRA, VeRA and their relatives; for a full fine-tune: "
                f"align extract {quote(str(self.checkpoint.folder))} rank=N",
            )
        return combined(self.bases.terms(self.checkpoint, self.load))

    def on_base(self, adapter_folder: Path) -> Any:
        """A written adapter as stock peft opens it, on a private copy of the base."""
        model = self.bases.root(self.load).private()
        model.set_attn_implementation("eager")
        loaded = PeftModel.from_pretrained(model, str(adapter_folder))
        return loaded.eval()

    def require_language_model(self, verb: str) -> None:
        """Refuse a checkpoint with a score head where a language model is wanted."""
        if self.checkpoint.record.get("head"):
            raise UserError(
                f"{self.checkpoint.label} is a {self.checkpoint.record['role']} model: {verb} would lose its head",
                code="has_head",
                hint=f"align export {quote(str(self.checkpoint.folder))} form=sequence_classification",
            )


TEXTS = (
    "The committee met on Tuesday to discuss the budget, and nobody was surprised when it ran late.",
    "To boil an egg, bring water to a boil, lower the egg in gently and wait between six and ten minutes.",
    "def area(width, height):\n    return width * height\n",
    "Q: What is 17 times 3?\nA: 17 times 3 is 51.",
    "Dear Ms Alvarez, thank you for your letter of 3 March. We are sorry about the delay.",
    "Light takes about eight minutes and twenty seconds to travel from the sun to the earth.",
    "He opened the door; the room was empty, except for a chair, a lamp and a very old piano.",
    "Hello! How are you today? I was wondering whether you could help me plan a birthday party.",
)
"""Neutral probe texts, read beside the rows that a checkpoint keeps as its own probe."""


def probe_rows(tokenizer: object, own: Sequence[list[int]], context: int) -> list[list[int]]:
    """The rows to measure on: a checkpoint's own probe and the neutral texts, each within the context."""
    encode = tokenizer.encode  # type: ignore[attr-defined]
    rows = [*own, *(encode(text, add_special_tokens=False) for text in TEXTS)]
    return [row[:context] for row in rows if row]
