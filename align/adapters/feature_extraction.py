"""Feature extraction: train the last blocks, the norms or the head, and leave the rest as a fixed extractor.

"BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", arXiv 1810.04805, section 5.3, has
the feature-based approach; training the last k blocks is common practice. The trained weights are private copies under
the same names, so the shared base stays as it is, and a tied head is untied. With `last_blocks=0` and nothing else, a
reward model trains its own head alone. Cost: a copy of what is trained, with its optimiser state; no activations are
kept for the blocks below; a checkpoint holds the trained weights. None at inference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from align.adapters.base import Counts, Traits, adapter
from align.adapters.file_format import OwnFormat
from align.adapters.shapes import base_parameters, meta_model
from align.adapters.targets import block_of
from data_prep.core.errors import UserError
from data_prep.core.options import option

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@adapter("feature_extraction")
@dataclass
class FeatureExtraction(OwnFormat):
    """Train the last blocks, the norms or the head of the model itself."""

    method: str = "feature_extraction"
    last_blocks: int = option(1, "blocks to train, from the last one down")
    norms: bool = option(False, "train every norm too")
    head: bool = option(False, "train the language-model head too; a tied one gets weights of its own")

    traits: ClassVar[Traits] = Traits(low_rank=False, bf16=False, portable=False, reads_weights=True, latency="none")
    lr_factor: ClassVar[float] = 0.25

    def check(self, model_config: dict[str, Any]) -> list[UserError]:
        blocks = len(_blocks(meta_model(model_config)))
        if self.last_blocks <= blocks:
            return []
        problem = f"the model has {blocks} blocks (got {self.last_blocks})"
        return [UserError(problem, field="adapter.last_blocks", code="bad_value", hint="use adapter=full")]

    def names(self, model: Any) -> list[str]:
        """Full names of the parameters to train."""
        from align.adapters.layers.private_weights import norm_names

        blocks = _blocks(model)
        found = [name for number in blocks[len(blocks) - self.last_blocks :] for name in _within(model, number)]
        if self.norms:
            found += [name for name in norm_names(model) if name not in found]
        if self.head:
            head = model.get_output_embeddings()
            place = next(name for name, module in model.named_modules() if module is head)
            found += [f"{place}.{name}" for name, _ in head.named_parameters()]
        return found

    def count(self, model_config: dict[str, Any]) -> Counts:
        model = meta_model(model_config)
        trainable = sum(model.get_parameter(name).numel() for name in self.names(model))
        return Counts(trainable, 0, base_parameters(model_config) + trainable)

    def insert(self, tree: PreTrainedModel, trainable: bool) -> None:
        from align.adapters.layers.private_weights import make_private

        names = self.names(tree)
        make_private(tree, names, trainable)
        vars(tree)["align_selected"] = names

    def tensors(self, tree: PreTrainedModel) -> dict[str, Tensor]:
        return {name: tree.get_parameter(name) for name in vars(tree)["align_selected"]}

    def merge(self, carrier: PreTrainedModel) -> PreTrainedModel:
        return carrier


def _blocks(model: Any) -> list[int]:
    """Numbers of the model's blocks."""
    return sorted({number for name, _ in model.named_parameters() if (number := block_of(name)) is not None})


def _within(model: Any, number: int) -> list[str]:
    """Names of the parameters of a block."""
    return [name for name, _ in model.named_parameters() if block_of(name) == number]
