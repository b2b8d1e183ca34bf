"""AdaLoRA's layers P diag(E) Q, the importance of their directions, and the budget that decides which of them stay.

Shape suffixes: R rank, I in, O out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.lora import bnb
from torch import Tensor, nn

from align.adapters.layers.lora_offset import lora_layers
from align.adapters.layers.own_linear import is_own, with_term


class _Allocated:
    """Computes W x + s B diag(E) A x."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        layer: Any = self
        if is_own(layer):
            return with_term(layer, x, layer.lora_B["default"].weight * layer.lora_E)
        out: Tensor = layer.base_layer(x, *args, **kwargs)
        down = layer.lora_A["default"].weight
        hidden = layer.lora_dropout["default"](x.to(down.dtype))
        term = F.linear(F.linear(hidden, down), layer.lora_B["default"].weight * layer.lora_E)
        together: Tensor = out + term * layer.scaling["default"]
        return together.to(out.dtype)  # as peft adds and rounds, so that a plain LoRA is bit-equal


class AllocatedLinear(_Allocated, lora.Linear):
    """peft's LoRA layer with a diagonal between its two matrices."""


class AllocatedLinear4bit(_Allocated, bnb.Linear4bit):
    """The same on a 4-bit weight."""


@torch.no_grad()
def put_diagonal(carrier: Any) -> None:
    """Turn every LoRA layer into P diag(E) Q: P and Q small random, E zero."""
    for layer in lora_layers(carrier).values():
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        layer.__class__ = AllocatedLinear4bit if isinstance(layer, bnb.Linear4bit) else AllocatedLinear
        layer.lora_E = nn.Parameter(torch.zeros(down.shape[0], device=down.device))
        layer.register_buffer("pruned", torch.zeros_like(layer.lora_E, dtype=torch.bool), persistent=False)
        layer.register_buffer("fixed", torch.tensor(False), persistent=False)
        nn.init.normal_(down, std=0.02)
        nn.init.normal_(up, std=0.02)


def state(carrier: Any) -> dict[str, Tensor]:
    """Statistics and decisions, by name."""
    found: dict[str, Tensor] = {}
    for name, layer in lora_layers(carrier).items():
        kept = {"pruned": layer.pruned, "fixed": layer.fixed, **vars(layer).get("running", {})}
        found |= {f"{name}.{key}": value for key, value in kept.items()}
    return found


def observe(carrier: Any) -> None:
    """Make room for the running importance of every number."""
    for layer in lora_layers(carrier).values():
        parts = [(part, p.detach()) for part, p in _parts(layer).items()]
        layer.running = {f"{kind}_{part}": torch.zeros_like(p) for part, p in parts for kind in ("mean", "spread")}


@dataclass
class Allocation:
    """The course of the budget over a stage."""

    start: int
    """Directions at the beginning, over all layers."""
    end: int
    """Directions that stay."""
    warmup: int
    """Steps before any is dropped."""
    final: int
    """Step from which the choice is fixed."""
    every: int
    """Steps between choices."""
    memory: float
    """Decay of the running importance and of its spread."""

    def budget(self, step: int) -> int:
        """Directions that may stay after `step`: a cubic course from `start` to `end`."""
        if step >= self.final:
            return self.end
        done = max(0.0, (step - self.warmup) / max(1, self.final - self.warmup))
        return round(self.end + (self.start - self.end) * (1.0 - done) ** 3)

    @torch.no_grad()
    def after_step(self, carrier: Any, step: int) -> None:
        """Take the step's gradients into account, and drop directions when it is time."""
        layers = lora_layers(carrier)
        open_layers = {n: m for n, m in layers.items() if not bool(m.fixed)}
        for layer in open_layers.values():
            self._observe(layer)
        if open_layers and (step == self.final or (self.warmup < step < self.final and step % self.every == 0)):
            self._choose(open_layers, self.budget(step), fixed=step == self.final)
        for layer in layers.values():
            layer.lora_E[layer.pruned] = 0.0

    def _observe(self, layer: Any) -> None:
        """Running mean of |w g| and of its deviation from that mean; eq. 8 to 10 of the paper."""
        for part, parameter in _parts(layer).items():
            if parameter.grad is None:
                continue
            now = (parameter * parameter.grad).abs()
            mean, spread = layer.running[f"mean_{part}"], layer.running[f"spread_{part}"]
            mean.lerp_(now, 1.0 - self.memory)
            spread.lerp_((now - mean).abs(), 1.0 - self.memory)

    def _choose(self, layers: dict[str, Any], budget: int, fixed: bool) -> None:
        """Keep the `budget` most important directions of all layers together."""
        scores = torch.cat([_importance(layer) for layer in layers.values()])
        order = torch.argsort(scores, descending=True, stable=True)
        dropped = torch.ones_like(scores, dtype=torch.bool)
        dropped[order[:budget]] = False
        for layer, pruned in zip(layers.values(), dropped.split([len(m.pruned) for m in layers.values()]), strict=True):
            layer.pruned.copy_(pruned)
            layer.fixed.fill_(fixed)


def add_orthogonality(carrier: Any, optimizer: torch.optim.Optimizer, weight: float) -> None:
    """Pull P^T P and Q Q^T towards the identity: before every step, the gradient of weight x |P^T P - I|^2 is added."""
    layers = lora_layers(carrier)

    def add(*_: Any) -> None:
        with torch.no_grad():
            for layer in layers.values():
                down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                unit = torch.eye(down.shape[0], device=down.device, dtype=down.dtype)
                if down.grad is not None and up.grad is not None:
                    down.grad += 4.0 * weight * (down @ down.T - unit) @ down
                    up.grad += 4.0 * weight * up @ (up.T @ up - unit)

    optimizer.register_step_pre_hook(add)


def _parts(layer: Any) -> dict[str, Tensor]:
    return {"down": layer.lora_A["default"].weight, "up": layer.lora_B["default"].weight, "size": layer.lora_E}


def _importance(layer: Any) -> Tensor:
    """Of every direction, [R]: that of its size, and the means over its row and column; eq. 7 of the paper."""
    running = layer.running
    scored = {part: running[f"mean_{part}"] * running[f"spread_{part}"] for part in _parts(layer)}
    found: Tensor = scored["size"] + scored["down"].mean(1) + scored["up"].mean(0)
    return found
