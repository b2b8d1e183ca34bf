"""Low-rank terms: the exact form `W x + s B A x` that lets one method be stacked on another, or merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.adapters.layers.four_bit import is_four_bit
from align.adapters.layers.stacked import StackedConv1D, StackedLinear, StackedLinear4bit, append_term
from data_prep.errors import UserError


@dataclass(frozen=True)
class LowRankTerm:
    """One frozen term of a linear layer: `scale * up @ (down @ x)`."""

    down_RI: Tensor
    up_OR: Tensor
    scale: float

    def delta(self) -> Tensor:
        """The dense change of the weight, [out, in], float32."""
        return self.scale * (self.up_OR.float() @ self.down_RI.float())


LowRankTerms = dict[str, LowRankTerm]
"""Module name inside the tree -> its term."""


def stack(tree: PreTrainedModel, terms: LowRankTerms) -> None:
    """Put frozen terms inside the tree's own linear layers; adapters then wrap them like any linear layer."""
    for name, term in terms.items():
        module = tree.get_submodule(name)
        if not isinstance(module, torch.nn.Linear | Conv1D):
            raise UserError(f"cannot stack on '{name}': not a linear layer", hint="use on_parent=merge")
        if not isinstance(module, StackedLinear | StackedLinear4bit | StackedConv1D):
            plain = StackedConv1D if isinstance(module, Conv1D) else StackedLinear
            module.__class__ = StackedLinear4bit if is_four_bit(module) else plain
        append_term(module, term.down_RI, term.up_OR, term.scale)


def merge(model: PreTrainedModel, terms: LowRankTerms) -> None:
    """Add terms to the weights of a private float32 copy, in place.

    Raises:
        UserError: a layer whose weight is also the embedding: the change would reach both.
    """
    for name, term in terms.items():
        module: Any = model.get_submodule(name)
        if module.weight is model.get_input_embeddings().weight:
            raise UserError(
                f"cannot merge into '{name}': its weight is the embedding's too",
                hint="use on_parent=stack, or leave the head out of target_modules",
            )
        delta = term.delta().to(module.weight.device)
        module.weight.data += delta.T if isinstance(module, Conv1D) else delta
