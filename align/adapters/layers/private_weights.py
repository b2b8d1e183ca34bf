"""Weights of a tree that are trained in place of the shared ones: private copies under the same names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.models.four_bit import dequantised_linear, is_four_bit
from align.models.sharding import own_part, whole


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation: LayerNorm, or any architecture's RMSNorm."""
    return isinstance(module, nn.LayerNorm) or "norm" in type(module).__name__.lower()


def norm_names(model: nn.Module) -> list[str]:
    """Full names of every normalisation's parameters."""
    return [f"{n}.{p}" for n, m in model.named_modules() if is_norm(m) for p, _ in m.named_parameters(recurse=False)]


def make_private(tree: PreTrainedModel, names: Iterable[str], trainable: bool, whole_in_each: bool = False) -> None:
    """Replace parameters of this tree alone by float32 copies; a 4-bit layer becomes a plain one of its values.

    Where trained weights are cut, a process has its part of the copies, or all of them (`whole_in_each`).
    """
    for name in names:
        owner, _, last = name.rpartition(".")
        module: Any = tree.get_submodule(owner)
        if is_four_bit(module):
            outer, _, own = owner.rpartition(".")
            module = dequantised_linear(module)
            setattr(tree.get_submodule(outer), own, module)
        value: Tensor = whole(getattr(module, last).detach()).to(torch.float32, copy=True)
        kept = value if whole_in_each else own_part(tree, value)
        setattr(module, last, nn.Parameter(kept, requires_grad=trainable))
