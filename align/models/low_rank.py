"""Low-rank terms: the exact form `W x + s B A x` that lets one method be stacked on another, or merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.models.four_bit import is_four_bit
from align.models.stacked_linear import StackedConv1D, StackedLinear, StackedLinear4bit, append_term
from data_prep.core.errors import UserError


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
            raise UserError(f"cannot stack on '{name}': not a linear layer", hint="set stages.STAGE.on_parent=merge")
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
                hint="set stages.STAGE.on_parent=stack, or leave the head out of adapter.target_modules",
            )
        delta = term.delta().to(module.weight.device)
        module.weight.data += delta.T if isinstance(module, Conv1D) else delta


@dataclass(frozen=True)
class Kept:
    """How many directions of a matrix to keep: a number, or as many as hold a share of its squared norm."""

    rank: int | None = None
    energy: float | None = None

    def of(self, singular_R: Tensor) -> int:
        """Directions to keep of singular values in falling order; at least one."""
        if self.rank is not None:
            return min(self.rank, len(singular_R))
        assert self.energy is not None
        squares = singular_R.double().square()
        held = squares.cumsum(0) >= self.energy * squares.sum() * (1 - 1e-12)
        return int(held.int().argmax()) + 1


def combined(layers: Sequence[LowRankTerms]) -> LowRankTerms:
    """Terms that add up to every term of `layers`: ranks add, nothing is lost, scales become 1."""
    names = {name: None for terms in layers for name in terms}
    return {name: _joined([terms[name] for terms in layers if name in terms]) for name in names}


def _joined(terms: Sequence[LowRankTerm]) -> LowRankTerm:
    down = torch.cat([term.down_RI.float() for term in terms])
    up = torch.cat([term.up_OR.float() * term.scale for term in terms], dim=1)
    return LowRankTerm(down, up, 1.0)


def truncated(term: LowRankTerm, kept: Kept) -> tuple[LowRankTerm, Tensor]:
    """The nearest term of smaller rank (Eckart-Young), and the term's singular values, [R].

    QR of both factors and an SVD of the R x R core, in float64; the dense product is never built.
    """
    q_up, r_up = torch.linalg.qr(term.up_OR.double())
    q_down, r_down = torch.linalg.qr(term.down_RI.double().T)
    u, singular, vh = torch.linalg.svd(term.scale * r_up @ r_down.T)
    number = kept.of(singular)
    return _balanced(q_up @ u, singular, vh @ q_down.T, number), singular


def factored(delta_OI: Tensor, kept: Kept) -> tuple[LowRankTerm, Tensor]:
    """The nearest term to a dense change of a weight, and the change's singular values."""
    u, singular, vh = torch.linalg.svd(delta_OI.double(), full_matrices=False)
    return _balanced(u, singular, vh, kept.of(singular)), singular


def _balanced(u: Tensor, singular: Tensor, vh: Tensor, number: int) -> LowRankTerm:
    """Both factors carry the root of the singular values, as PiSSA's do."""
    root = singular[:number].sqrt()
    return LowRankTerm((root[:, None] * vh[:number]).float(), (u[:, :number] * root).float(), 1.0)


def share_lost(singular_R: Tensor, number: int) -> float:
    """Relative Frobenius error of keeping `number` directions: 0 is exact, 1 keeps nothing."""
    total = float(singular_R.square().sum())
    return (float(singular_R[number:].square().sum()) / total) ** 0.5 if total else 0.0
