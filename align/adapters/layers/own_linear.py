"""peft's LoRA layers, whose term is added by `align/models/own_functions.py:add_low_rank` instead of three modules."""

from __future__ import annotations

from typing import Any

from peft.tuners import lora
from peft.tuners.lora import bnb
from torch import Tensor

from align.adapters.layers.lora_offset import lora_layers
from align.models.own_functions import add_low_rank
from align.models.own_modules import is_plain


class _Own:
    """Computes W x + s B A x; whatever else peft's layers can do is left to peft."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        layer: Any = self
        if not is_own(layer) or layer.disable_adapters or layer.merged or args or kwargs:
            found: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return found
        return with_term(layer, x, layer.lora_B["default"].weight)


class OwnLinear(_Own, lora.Linear):
    """On a weight that is not quantised."""


class OwnLinear4bit(_Own, bnb.Linear4bit):
    """On a 4-bit weight."""


def with_term(layer: Any, x: Tensor, up_OR: Tensor, share: float = 1.0) -> Tensor:
    """W x + share s up A x."""
    out: Tensor = layer.base_layer(x)
    if out._is_view():  # as of a 4-bit layer's own function, whose result may not be changed
        out = out.clone()
    dropped = layer.lora_dropout["default"](x)
    return add_low_rank(out, dropped, layer.lora_A["default"].weight, up_OR, layer.scaling["default"] * share)


def is_own(layer: Any) -> bool:
    """Whether the layer's term is added by our function."""
    return bool(vars(layer).get("own_term"))


def use_own(carrier: Any) -> None:
    """Let every layer of the carrier that is a plain LoRA layer use ours, unless the model is to stay plain."""
    if is_plain(carrier.get_base_model()):
        return
    kinds: dict[Any, Any] = {lora.Linear: OwnLinear, bnb.Linear4bit: OwnLinear4bit}
    for layer in lora_layers(carrier).values():
        kind = kinds.get(type(layer))
        if kind is not None and not layer.lora_variant and not any(layer.lora_bias.values()):
            layer.__class__, layer.own_term = kind, True
