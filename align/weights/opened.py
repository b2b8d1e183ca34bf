"""A checkpoint opened for work outside a run: verified, with the bases it stands on and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from align.base import BaseIdentity
from align.chain import adapter_of
from align.checkpoint import Checkpoint, resolve_checkpoint
from align.fingerprint import base_fingerprint, read_model_config
from align.options import Load
from align.roles import Bases, Role
from data_prep.errors import UserError
from data_prep.rendering import Renderer


@dataclass
class Opened:
    """A checkpoint whose files, parents and base have been checked against their records."""

    checkpoint: Checkpoint
    base_folder: Path
    bases: Bases

    @classmethod
    def target(cls, target: str, out: str) -> Opened:
        """Open TARGET: a path, RUN or RUN/STAGE; whatever does not fit is refused before weights load."""
        checkpoint = resolve_checkpoint(target, out)
        folder = checkpoint.base_folder()
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
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.base_folder, local_files_only=True)

    @cached_property
    def renderer(self) -> Renderer:
        """The tokenizer with its chat template."""
        return Renderer(self.tokenizer)

    @property
    def context(self) -> int:
        """Longest row in tokens."""
        return int(read_model_config(self.base_folder).get("max_position_embeddings") or 1024)

    def require_language_model(self, verb: str) -> None:
        """Refuse a checkpoint with a score head where a language model is wanted."""
        if self.checkpoint.record.get("head"):
            raise UserError(
                f"{self.checkpoint.label} is a {self.checkpoint.record['role']} model: {verb} would lose its head",
                code="has_head",
                hint=f"align export {self.checkpoint.folder} form=sequence_classification",
            )
