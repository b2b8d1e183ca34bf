"""4-bit linear layers of bitsandbytes, made safe for weights that several trees share."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch

from align.models.sharding import whole


class PinnedLinear4bit(bnb.nn.Linear4bit):  # type: ignore[misc,name-defined]
    """A `Linear4bit` that never leaves training mode, so its packed bytes are never rewritten in place."""

    def train(self, mode: bool = True) -> PinnedLinear4bit:
        """Stay in training mode whatever `mode` says."""
        super().train(True)
        return self


def is_four_bit(module: torch.nn.Module) -> bool:
    """Whether the module holds its weight in 4 bits."""
    return isinstance(module, bnb.nn.Linear4bit)  # type: ignore[attr-defined]


def dequantised_weight(module: Any) -> torch.Tensor:
    """The weight [out, in] of a 4-bit layer as the layer computes with it, in float32."""
    weight = module.weight
    return bnb.functional.dequantize_4bit(whole(weight.data), weight.quant_state).to(torch.float32)


def dequantised_linear(module: Any) -> torch.nn.Linear:
    """An ordinary float32 linear layer with a 4-bit layer's effective weights."""
    weight = dequantised_weight(module)
    plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, device=weight.device)
    plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        plain.bias = torch.nn.Parameter(module.bias.data.to(torch.float32), requires_grad=False)
    return plain
