"""Delta-LoRA's layers: the exact sum of its steps beside the shared weight, or the steps written into a private one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import bnb
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from align.adapters.file_format import read_exactly, write_own_config
from align.adapters.layers.lora_offset import PREFIX, gain_of, lora_layers, offset_of, subtract
from align.adapters.layers.own_linear import OwnLinear, OwnLinear4bit, is_own
from align.models.own_functions import add_low_rank
from align.models.sharding import whole


class _Following:
    """Adds (g - 1) s B A x, with no gradient for A and B, to what peft's layer computes."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        layer: Any = self
        out: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        down, up = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        if is_own(layer):
            return add_low_rank(out, x, down, up, layer.scaling["default"] * (layer.gain - 1.0))
        more = F.linear(F.linear(x.to(down.dtype), down), up) * (layer.scaling["default"] * (layer.gain - 1.0))
        out = out + more.to(out.dtype)
        return out


class FollowingLinear(_Following, OwnLinear):
    """peft's LoRA layer whose weight follows."""


class FollowingLinear4bit(_Following, OwnLinear4bit):
    """The same on a 4-bit weight."""


def follow(carrier: Any, share: float) -> None:
    """Let the weights follow the term by `share` (lambda) of its changes."""
    for layer in lora_layers(carrier).values():
        layer.__class__ = FollowingLinear4bit if isinstance(layer, bnb.Linear4bit) else FollowingLinear
        layer.gain = 1.0 + share


def pause(carrier: Any) -> None:
    """Begin the K steps in which the weights stand still: what the term is now will be subtracted."""
    for name, layer in lora_layers(carrier).items():
        down, up = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        subtract(carrier, name, down.clone(), torch.zeros_like(up))
        layer.get_base_layer().register_buffer("paused", torch.tensor(True), persistent=False)


@torch.no_grad()
def pass_by(carrier: Any) -> None:
    """Subtract what the term is now, as long as the layer stands still."""
    for layer in lora_layers(carrier).values():
        pair, gain = offset_of(layer), gain_of(layer)
        if pair is not None and getattr(layer.get_base_layer(), "paused", False):
            pair[0].copy_(layer.lora_A["default"].weight)
            pair[1].copy_(layer.lora_B["default"].weight * ((gain - 1.0) / gain))


def state(carrier: Any) -> dict[str, Tensor]:
    """What the steps change beside A and B."""
    found: dict[str, Tensor] = {}
    for name, layer in lora_layers(carrier).items():
        below = layer.get_base_layer()
        if (pair := offset_of(layer)) is not None:
            found[f"{name}.offset_down"], found[f"{name}.offset_up"] = pair
        if hasattr(below, "paused"):
            found[f"{name}.paused"] = below.paused
        if hasattr(layer, "before"):
            found[f"{name}.weight"] = below.weight.data
            found[f"{name}.before_down"], found[f"{name}.before_up"] = layer.before
    return found


def own_weights(carrier: Any) -> None:
    """Give every targeted layer of this tree a weight of its own, to be written to."""
    for layer in lora_layers(carrier).values():
        below = layer.get_base_layer()
        below.weight = torch.nn.Parameter(whole(below.weight.detach()).clone(), requires_grad=False)
        layer.before = _pair(layer)


@torch.no_grad()
def write_step(carrier: Any, share: float) -> None:
    """W <- W + lambda s (B' A' - B A), as published."""
    for layer in lora_layers(carrier).values():
        down, up = _pair(layer)
        below = layer.get_base_layer()
        if share:
            step = share * layer.scaling["default"] * (up @ down - layer.before[1] @ layer.before[0])
            below.weight += step.T if isinstance(below, Conv1D) else step
        layer.before[0].copy_(down)
        layer.before[1].copy_(up)


def save_weights(carrier: Any, folder: Path) -> None:
    """Write A, B and the written weights."""
    save_file({n: t.detach().contiguous() for n, t in _weights(carrier).items()}, folder / "adapter_model.safetensors")
    write_own_config(folder, "delta_lora_literal")


@torch.no_grad()
def read_weights(carrier: Any, file: Path) -> None:
    """Fill A, B and the written weights."""
    own = _weights(carrier)
    for name, value in read_exactly(file, {n: tuple(t.shape) for n, t in own.items()}).items():
        own[name].copy_(value)
    for layer in lora_layers(carrier).values():
        layer.before = _pair(layer)


def _pair(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.detach().clone()


def _weights(carrier: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, layer in lora_layers(carrier).items():
        found[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A["default"].weight
        found[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B["default"].weight
        found[f"{PREFIX}{name}.base_layer.weight"] = layer.get_base_layer().weight
    return found
