"""Algebra of low-rank terms: sums of terms as one term, and the best term of a smaller rank.

Shape suffixes: O out, I in, R rank, K kept rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.low_rank import LowRankTerm, LowRankTerms


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
