"""The two small layers of a bottleneck adapter, and how they join a module without renaming it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BottleneckLayer(nn.Module):
    """s U phi(D x), with a layer norm of its own before it if asked; U starts at zero. Computed in float32."""

    def __init__(self, width: int, small: int, activation: str, own_norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if own_norm else None
        self.down = nn.Linear(width, small)
        self.up = nn.Linear(small, width)
        self.dropout = nn.Dropout(0.0)
        self.activation: Any = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}[activation]
        self.scale = 1.0
        nn.init.normal_(self.down.weight, std=width**-0.5)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        hidden = x.to(self.down.weight.dtype)
        if self.norm is not None:
            hidden = self.norm(hidden)
        hidden = self.dropout(self.activation(self.down(hidden)))
        out: Tensor = self.up(hidden) * self.scale
        return out.to(x.dtype)


def add_to_output(module: nn.Module, layer: BottleneckLayer, from_input: bool) -> None:
    """Add what the layer makes of a module's output (or first input) to that output, in this tree alone."""
    module.add_module("bottleneck", layer)

    def add(owner: Any, inputs: tuple[Any, ...], out: Any) -> Any:
        if not isinstance(out, torch.Tensor):
            raise TypeError(f"{type(owner).__name__} does not return a tensor, so nothing can be added to it")
        return out + owner.bottleneck(inputs[0] if from_input else out)

    module.register_forward_hook(add)
