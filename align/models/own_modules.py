"""Modules of a loaded model, made to compute with `align/models/own_functions.py` where that is the same function.

Which modules those are is found out and not listed: a module is changed when it has the parts of an RMSNorm or of a
SwiGLU layer, and gives the same bits and type as the plain formula on a probe. All others stay as transformers has
them, as does every module of a model that was loaded with `model.plain=true`.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align.models.own_functions import gated, normalised

_PLAIN = "align_plain"
_made: dict[tuple[type, type], type] = {}


def is_plain(tree: Any) -> bool:
    """Whether the tree's model was asked to compute with the libraries' own modules alone."""
    return bool(vars(tree).get(_PLAIN))


def put_in(model: nn.Module, plain: bool = False) -> None:
    """Let every module for which there is an own function use it; with `plain` none, now and in trees of the model."""
    vars(model)[_PLAIN] = plain
    if plain:
        return
    module: Any
    for module in model.modules():
        for own, fits in ((_Norm, _is_norm), (_Gate, _is_gate)):
            if not isinstance(module, own) and fits(module):
                module.__class__ = _own_class(own, type(module))


def take_out(model: nn.Module) -> None:
    """Give every module the class back that it had."""
    for module in model.modules():
        if isinstance(module, _Norm | _Gate):
            module.__class__ = type(module).__mro__[2]


def _own_class(own: type, theirs: type) -> type:
    """`theirs` with the forward of `own`, under its own name, by which others may know it."""
    if (own, theirs) not in _made:
        _made[own, theirs] = type(theirs.__name__, (own, theirs), {"__module__": theirs.__module__})
    return _made[own, theirs]


class _Norm:
    """x over its root mean square, times a weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        module: Any = self
        return normalised(hidden_states, module.weight, _eps(module))


class _Gate:
    """down(silu(gate(x)) up(x))."""

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        found: Tensor = module.down_proj(gated(module.gate_proj(x), module.up_proj(x)))
        return found


def _eps(module: Any) -> float:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(found) if isinstance(found, float) else -1.0


@torch.no_grad()
def _is_norm(module: Any) -> bool:
    parts = [name for name, _ in module.named_parameters()]
    if parts != ["weight"] or module.weight.dim() != 1 or _eps(module) < 0 or list(module.children()):
        return False
    module = _with_numbers(module)
    weight_D = module.weight
    for kind in {weight_D.dtype, torch.float32, torch.bfloat16}:
        x_ND = _probe(weight_D.shape[0], weight_D.device).to(kind)
        wide_ND = x_ND.float()
        scaled_ND = wide_ND * torch.rsqrt(wide_ND.pow(2).mean(-1, keepdim=True) + _eps(module))
        try:
            found_ND = module(x_ND)
        except (RuntimeError, TypeError):
            return False
        expected_ND = weight_D * scaled_ND.to(kind)
        if found_ND.dtype != expected_ND.dtype or not torch.equal(found_ND, expected_ND):
            return False
    return True


def _with_numbers(module: Any) -> Any:
    """The module; where its weight is on the meta device, one like it whose weight has numbers."""
    if not module.weight.is_meta:
        return module
    alone = copy.copy(module)
    weight_D = _probe(module.weight.shape[0], torch.device("cpu"))[0].to(module.weight.dtype)
    vars(alone)["_parameters"] = {"weight": nn.Parameter(weight_D, requires_grad=False)}
    return alone


@torch.no_grad()
def _is_gate(module: Any) -> bool:
    names = {name for name, _ in module.named_children()}
    if not {"gate_proj", "up_proj", "down_proj"} <= names <= {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    alone = SimpleNamespace(gate_proj=torch.sin, up_proj=torch.cos, down_proj=torch.atan, act_fn=module.act_fn)
    x = _probe(16, torch.device("cpu"))
    try:
        found: Tensor = type(module).forward(alone, x)
    except (AttributeError, TypeError, RuntimeError):
        return False
    return torch.equal(found, torch.atan(F.silu(torch.sin(x)) * torch.cos(x)))


def _probe(width: int, device: torch.device) -> Tensor:
    """Rows of small and of large numbers, [3, width]."""
    row = torch.sin(torch.arange(width, device=device) * 1.7 + 0.3)
    return torch.stack([row, row * 1e-3, row.flip(0) * 30.0 + 1.0])
