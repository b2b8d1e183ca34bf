"""Linear layers that carry frozen low-rank terms beside a shared weight: what `on_parent=stack` stands on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from align.models.four_bit import PinnedLinear4bit, dequantised_weight, is_four_bit
from align.models.sharding import whole


def append_term(module: Any, down_RI: Tensor, up_OR: Tensor, scale: float) -> None:
    """Add one frozen term; its tensors are kept as given, so trees that stack the same parent share them."""
    scales: list[float] = module.__dict__.setdefault("term_scales", [])
    number = len(scales)
    module.register_buffer(f"term_down_{number}", down_RI, persistent=False)
    module.register_buffer(f"term_up_{number}", up_OR, persistent=False)
    scales.append(scale)


def drop_last_term(module: Any) -> None:
    """Take the term that was added last out again."""
    number = len(module.term_scales) - 1
    module.term_scales.pop()
    delattr(module, f"term_down_{number}")
    delattr(module, f"term_up_{number}")


def effective_weight(module: Any) -> Tensor:
    """What a linear layer multiplies with, [out, in], float32: dequantised, terms included."""
    weight = dequantised_weight(module) if is_four_bit(module) else whole(module.weight.detach()).float()
    if isinstance(module, Conv1D):
        weight = weight.T
    for number, scale in enumerate(module.__dict__.get("term_scales", [])):
        down, up = getattr(module, f"term_down_{number}"), getattr(module, f"term_up_{number}")
        weight = weight + scale * (up.float() @ down.float())
    return weight


def _with_terms(module: Any, x: Tensor, out: Tensor) -> Tensor:
    for number, scale in enumerate(module.term_scales):
        down, up = getattr(module, f"term_down_{number}"), getattr(module, f"term_up_{number}")
        out = out + (F.linear(F.linear(x.to(down.dtype), down), up) * scale).to(out.dtype)
    return out


class StackedLinear(torch.nn.Linear):
    """`nn.Linear` plus frozen terms; the shared weight is untouched."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return _with_terms(self, input, super().forward(input))


class StackedConv1D(Conv1D):
    """GPT-2's linear layer, which keeps its weight transposed, plus frozen terms."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return _with_terms(self, x, super().forward(x))  # type: ignore[no-untyped-call]


class StackedLinear4bit(PinnedLinear4bit):
    """A shared 4-bit layer plus frozen terms in higher precision."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return _with_terms(self, x, super().forward(x))
