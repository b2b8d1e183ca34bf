"""Full fine-tuning: every weight of a private copy of the base is trained.

No paper; the plain alternative to every adapter method. The role owns its weights, so it costs a second copy of the
base in float32 (4 bytes per parameter, 16 with gradients and Adam) and its checkpoint holds the whole model. As a
parent it becomes the next stage's base.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from align.adapters.base import Adapter, Counts, Traits, adapter
from align.adapters.shapes import base_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@adapter("full")
@dataclass
class Full(Adapter):
    """Train every weight of a private copy of the base."""

    method: str = "full"
    traits: ClassVar[Traits] = Traits(
        mergeable=False, low_rank=False, four_bit=False, bf16=False, portable=False, owns_weights=True, latency="none"
    )
    lr_factor: ClassVar[float] = 0.25

    def attach(self, tree: PreTrainedModel, trainable: bool) -> PreTrainedModel:
        """`tree` must already be a private copy (`SharedBase.private()`); a shared tree would train every role."""
        tree.requires_grad_(trainable)
        tree.eval()
        return tree

    def count(self, model_config: dict[str, Any]) -> Counts:
        total = base_parameters(model_config)
        return Counts(trainable=total, frozen=0, total=total)

    def save(self, carrier: PreTrainedModel, folder: Path) -> None:
        carrier.save_pretrained(folder)

    def load(self, tree: PreTrainedModel, folder: Path, trainable: bool) -> PreTrainedModel:
        """`tree` is a private copy of the base opened from `folder` itself."""
        return self.attach(tree, trainable)

    def files(self) -> tuple[str, ...]:
        return ("config.json", "model.safetensors")
