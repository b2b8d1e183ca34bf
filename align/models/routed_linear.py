"""Linear layers in which every row of a batch goes through its own adapter's low-rank terms, over one shared weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from align.models.four_bit import PinnedLinear4bit, is_four_bit
from align.models.low_rank import LowRankTerm


@dataclass
class Routing:
    """Which rows of the coming forward belong to which adapter; every routed layer of a tree holds the same one."""

    places: dict[str, Tensor] = field(default_factory=dict)
    """Adapter -> int64 indices along `dim`; what belongs to none goes through the base alone."""
    dim: int = 0
    """0: rows of a padded batch [B, T, in]; 1: tokens of a packed one [1, N, in]."""


def route(module: Any, terms: dict[str, list[LowRankTerm]], routing: Routing) -> None:
    """Turn a plain linear layer into one with terms for each adapter; its weight stays as it is."""
    plain = RoutedConv1D if isinstance(module, Conv1D) else RoutedLinear
    module.__class__ = RoutedLinear4bit if is_four_bit(module) else plain
    vars(module).update(routed_terms=terms, routing=routing)


def _through(module: Any, x: Tensor, out: Tensor) -> Tensor:
    routing: Routing = module.routing
    for adapter, terms in module.routed_terms.items():
        index = routing.places.get(adapter)
        if index is None or not len(index):
            continue
        part = x.index_select(routing.dim, index)
        for term in terms:
            change = F.linear(F.linear(part.to(term.down_RI.dtype), term.down_RI), term.up_OR) * term.scale
            out = out.index_add(routing.dim, index, change.to(out.dtype))
    return out


class RoutedLinear(torch.nn.Linear):
    """`nn.Linear` plus each row's own terms."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, T, in] -> [B, T, out]."""
        return _through(self, input, super().forward(input))


class RoutedConv1D(Conv1D):
    """GPT-2's linear layer, which keeps its weight transposed, plus each row's own terms."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, in] -> [B, T, out]."""
        return _through(self, x, super().forward(x))  # type: ignore[no-untyped-call]


class RoutedLinear4bit(PinnedLinear4bit):
    """A shared 4-bit layer plus each row's own terms in higher precision."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, in] -> [B, T, out]."""
        return _through(self, x, super().forward(x))
