"""Functions with gradients written by hand, where automatic ones keep or make more than they need.

Each computes what its plain form in the comment above it computes; `tests/align/models/test_own_functions.py` holds
them to it in float64. `docs/performance.md` has what each of them is worth, `model.plain=true` turns all of them off.
Where nothing is differentiated the first three skip autograd's `Function`, whose call takes longer than one token's
products; the bits are the same.

Shape suffixes: N tokens, M selected tokens, I in, O out, R rank, D width, F width of the feed-forward layer,
V vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any
from weakref import ReferenceType, ref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

HEAD_ROWS = 256
"""Tokens whose logits are held at a time on a CPU."""
HEAD_ELEMENTS = 1 << 27
"""Logits that are held at a time elsewhere."""


# out + (x @ down.T @ up.T) * scale
class _LowRank(torch.autograd.Function):
    """Adds in place: no tensor of [N, O] is made beside the one that is given. Keeps x only where `down` is trained."""

    @staticmethod
    def forward(ctx: Any, out_NO: Tensor, x_NI: Tensor, down_RI: Tensor, up_OR: Tensor, scale: float) -> Tensor:
        x_NI = x_NI.to(out_NO.dtype)
        hidden_NR = _add_term(out_NO, x_NI, down_RI, up_OR, scale)
        ctx.mark_dirty(out_NO)
        ctx.save_for_backward(x_NI if ctx.needs_input_grad[2] else None, hidden_NR, down_RI, up_OR)
        ctx.scale, ctx.x_shape = scale, x_NI.shape
        return out_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, hidden_NR, down_RI, up_OR = ctx.saved_tensors
        kind, flat_NO = gradient.dtype, gradient.reshape(-1, gradient.shape[-1])
        inner_NR = (flat_NO @ up_OR.to(kind)).mul_(ctx.scale)
        for_x = for_down = for_up = None
        if ctx.needs_input_grad[1]:
            for_x = (inner_NR @ down_RI.to(kind)).view(ctx.x_shape)
        if ctx.needs_input_grad[2]:
            for_down = (inner_NR.T @ x_NI.reshape(-1, x_NI.shape[-1])).to(down_RI.dtype)
        if ctx.needs_input_grad[3]:
            for_up = (flat_NO.T @ hidden_NR).mul_(ctx.scale).to(up_OR.dtype)
        return gradient, for_x, for_down, for_up, None


def add_low_rank(out_NO: Tensor, x_NI: Tensor, down_RI: Tensor, up_OR: Tensor, scale: float) -> Tensor:
    """`out_NO`, with the term x down^T up^T scale added to it in place; products in the type of `out_NO`.

    Both may have more axes before the last one. `out_NO` must be a fresh result that nothing else reads.
    """
    if not torch.is_grad_enabled():
        _add_term(out_NO, x_NI, down_RI, up_OR, scale)
        return out_NO
    return _LowRank.apply(out_NO, x_NI, down_RI, up_OR, scale)  # type: ignore[no-any-return, no-untyped-call]


class NarrowCopies:
    """While entered, factors of low-rank terms that are wider than the products are made narrow once and kept.

    For passes of one token, where making them takes a fifth of the kernels, and in which nothing is differentiated. A
    factor that has changed meanwhile is made again, and one that is no more is let go.
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[ReferenceType[Tensor], int, Tensor]] = {}

    def __enter__(self) -> None:
        self._before = _copies.set(self)

    def __exit__(self, *_: object) -> None:
        _copies.reset(self._before)

    def of(self, weight: Tensor, kind: torch.dtype) -> Tensor:
        """The weight in another type."""
        key = id(weight)
        known = self._held.get(key)
        if known is None or known[0]() is not weight or known[1] != weight._version or known[2].dtype != kind:
            known = ref(weight, lambda _: self._held.pop(key, None)), weight._version, weight.detach().to(kind)
            self._held[key] = known
        return known[2]


_copies: ContextVar[NarrowCopies | None] = ContextVar("copies", default=None)


def _narrow(weight: Tensor, kind: torch.dtype) -> Tensor:
    """A factor in the type of the products."""
    copies = None if weight.dtype == kind or torch.is_grad_enabled() else _copies.get()
    return weight.to(kind) if copies is None else copies.of(weight, kind)


def _add_term(out_NO: Tensor, x_NI: Tensor, down_RI: Tensor, up_OR: Tensor, scale: float) -> Tensor:
    """Add the term to `out_NO`; x down^T, [N, R]."""
    kind, device = out_NO.dtype, out_NO.device.type
    narrow = torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if narrow else nullcontext():
        hidden_NR = x_NI.to(kind).reshape(-1, x_NI.shape[-1]) @ _narrow(down_RI, kind).T
        out_NO.view(-1, out_NO.shape[-1]).addmm_(hidden_NR, _narrow(up_OR, kind).T, alpha=scale)
    return hidden_NR


# weight * (x.float() * rsqrt(x.float().square().mean(-1, keepdim=True) + eps)).to(x.dtype)
class _RootMeanSquare(torch.autograd.Function):
    """Keeps the input and one number a token instead of two further copies of the input."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        found_ND, inverse_N1 = _normal(x_ND, weight_D, eps)
        ctx.save_for_backward(x_ND, weight_D, inverse_N1)
        return found_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_D, inverse_N1 = ctx.saved_tensors
        for_x = for_weight = None
        if ctx.needs_input_grad[1]:
            for_weight = (gradient * (x_ND * inverse_N1)).reshape(-1, x_ND.shape[-1]).sum(0).to(weight_D.dtype)
        if ctx.needs_input_grad[0]:
            inner_ND = (gradient * weight_D).to(inverse_N1.dtype)
            wide_ND = x_ND.to(inverse_N1.dtype)
            share_N1 = torch.linalg.vecdot(inner_ND, wide_ND).unsqueeze(-1).mul_(inverse_N1.square())
            inner_ND.addcmul_(wide_ND, share_N1, value=-1.0 / x_ND.shape[-1]).mul_(inverse_N1)
            for_x = inner_ND.to(x_ND.dtype)
        return for_x, for_weight, None


def normalised(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm: x over its root mean square in float32, times the weight."""
    if not torch.is_grad_enabled():
        return _normal(x_ND, weight_D, eps)[0]
    return _RootMeanSquare.apply(x_ND, weight_D, eps)  # type: ignore[no-any-return, no-untyped-call]


def _normal(x_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm's result, and one over the root mean square of every token, [N, 1]."""
    wide_ND = x_ND if x_ND.dtype == torch.float64 else x_ND.float()
    inverse_N1 = torch.linalg.vecdot(wide_ND, wide_ND).div_(x_ND.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
    normal_ND = (wide_ND * inverse_N1).to(x_ND.dtype)
    found_ND = normal_ND.mul_(weight_D) if weight_D.dtype == normal_ND.dtype else weight_D * normal_ND
    return found_ND, inverse_N1


# silu(gate) * up
class _Gated(torch.autograd.Function):
    """Keeps the two inputs; silu(gate) is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_NF, up_NF)
        return _product(gate_NF, up_NF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate_NF, up_NF = ctx.saved_tensors
        for_gate = torch.ops.aten.silu_backward(gradient * up_NF, gate_NF)
        return for_gate, F.silu(gate_NF).mul_(gradient)


def gated(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """SwiGLU's product silu(gate) up."""
    if not torch.is_grad_enabled():
        return _product(gate_NF, up_NF)
    return _Gated.apply(gate_NF, up_NF)  # type: ignore[no-any-return, no-untyped-call]


def _product(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    return F.silu(gate_NF).mul_(up_NF)


# -cross_entropy(linear(hidden, weight, bias).float() * scale, targets, reduction="none")
class _ChosenLogprobs(torch.autograd.Function):
    """Makes the gradient of the hidden states, (W[y] - p W) scale, in the forward: logits live for a chunk alone.

    The gradients of a trained weight and bias are made in backward, from logits that are computed again. The forward is
    one for trained and for frozen heads, so that what was trained and what is read back give the same bits.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_M: Tensor, scale: float
    ) -> Tensor:
        wide = torch.float64 if hidden_MD.dtype == torch.float64 else torch.float32
        slope_MD = torch.empty_like(hidden_MD) if ctx.needs_input_grad[0] else None
        logprobs_M = torch.empty(hidden_MD.shape[0], dtype=wide, device=hidden_MD.device)
        for part in _chunks(hidden_MD, weight_VD):
            logits_CV, total_C1, share_CV = _logits(hidden_MD[part], weight_VD, bias_V, scale, wide)
            logprobs_M[part] = (logits_CV.gather(1, targets_M[part, None]) - total_C1)[:, 0]
            if slope_MD is not None:
                own_CD = weight_VD[targets_M[part]]
                slope_MD[part] = torch.addmm(own_CD, share_CV.to(weight_VD.dtype), weight_VD, alpha=-1.0) * scale
        ctx.save_for_backward(slope_MD, *((hidden_MD, weight_VD, bias_V, targets_M) if _head_learns(ctx) else ()))
        ctx.scale = scale
        return logprobs_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        slope_MD, *head = ctx.saved_tensors
        for_hidden = None if slope_MD is None else (slope_MD * gradient[:, None]).to(slope_MD.dtype)
        for_weight = for_bias = None
        if head:
            hidden_MD, weight_VD, bias_V, targets_M = head
            for_weight = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
            for_bias = torch.zeros_like(bias_V) if ctx.needs_input_grad[2] else None
            for part in _chunks(hidden_MD, weight_VD):
                hidden_CD = hidden_MD[part].to(weight_VD.dtype)  # under autocast it is narrower
                *_, share_CV = _logits(hidden_CD, weight_VD, bias_V, ctx.scale, gradient.dtype)
                away_CV = _away(share_CV, targets_M[part]).mul_(gradient[part, None] * ctx.scale)
                if for_weight is not None:
                    for_weight.addmm_(away_CV.to(weight_VD.dtype).T, hidden_CD)
                if for_bias is not None:
                    for_bias += away_CV.sum(0).to(for_bias.dtype)
        return for_hidden, for_weight, for_bias, None, None


def _head_learns(ctx: Any) -> bool:
    return bool(ctx.needs_input_grad[1] or ctx.needs_input_grad[2])


def _chunks(hidden_MD: Tensor, weight_VD: Tensor) -> list[slice]:
    """Parts of the tokens whose logits are held at a time."""
    rows = HEAD_ROWS if hidden_MD.device.type == "cpu" else max(1, HEAD_ELEMENTS // weight_VD.shape[0])
    return [slice(start, start + rows) for start in range(0, hidden_MD.shape[0], rows)]


def _logits(
    hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, scale: float, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a chunk, [C, V], the logarithm of the sum of their exponentials, [C, 1], and their softmax, [C, V].

    The sum is found from the softmax at the highest logit, which is never 0: exponentials are taken once.
    """
    logits_CV = F.linear(hidden_CD, weight_VD, bias_V).to(wide)
    if scale != 1.0:
        logits_CV = logits_CV * scale
    share_CV = torch.softmax(logits_CV, -1)
    highest_C1, place_C1 = logits_CV.max(-1, keepdim=True)
    return logits_CV, highest_C1 - share_CV.gather(1, place_C1).log(), share_CV


def _away(share_CV: Tensor, targets_C: Tensor) -> Tensor:
    """The gradient of the targets' log-probabilities by the logits, 1[y] - p, in the place of p."""
    return share_CV.neg_().scatter_add_(1, targets_C[:, None], torch.ones_like(share_CV[:, :1]))


def head_logprobs(
    hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_M: Tensor, scale: float = 1.0
) -> Tensor:
    """Log-probabilities [M] of targets under softmax of a linear head's logits times `scale`, in float32."""
    return _ChosenLogprobs.apply(hidden_MD, weight_VD, bias_V, targets_M, scale)  # type: ignore[no-any-return, no-untyped-call]


@torch.no_grad()
def head_statistics(
    hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_M: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """What `head_logprobs` gives, to the same bits, and the entropies in nats of the same distributions, [M] each."""
    wide = torch.float64 if hidden_MD.dtype == torch.float64 else torch.float32
    logprobs, entropies = [], []
    for part in _chunks(hidden_MD, weight_VD):
        logits_CV, total_C1, share_CV = _logits(hidden_MD[part], weight_VD, bias_V, scale, wide)
        logprobs.append((logits_CV.gather(1, targets_M[part, None]) - total_C1)[:, 0])
        entropies.append(-(share_CV.mul_(logits_CV.sub_(total_C1))).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)
