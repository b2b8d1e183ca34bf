"""Attention of packed rows as one kernel: torch's `varlen_attn` on CUDA in bfloat16 and float16.

A run is a stretch of packed tokens that ask (its queries) and all the tokens of its row up to its own end (its keys).
Rows that share a prefix are runs with fewer queries than keys, of which the queries are the last; the prefix is asked
for once, with the first of its rows. Elsewhere, and for what the kernel lacks (soft caps, sinks, virtual keys), rows
are attended to group by group (`packing.attend`).

Shape suffixes: N packed tokens, T keys of all runs, H heads, K key-value heads, D head width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.core.errors import said_by

Kernel = Callable[..., Any]
"""`torch.nn.attention.varlen.varlen_attn`, or a function of its signature."""
_KINDS = (torch.bfloat16, torch.float16)
_WIDEST = 256
"""Head widths that FlashAttention takes: multiples of 8 up to this."""
_TOLERANCE = 0.05
"""Of the largest number compared: bfloat16 keeps eight bits, and gradients of shared keys add up in it."""
_OLDEST = (8, 0)
"""Compute capability from which it runs (Ampere)."""


@dataclass(frozen=True)
class Runs:
    """The rows of a packed batch as runs; queries of run after run are the packed tokens in their order."""

    index: Tensor
    """int32: where the queries of each run begin (and the last ends), likewise the keys, and, where rows share
    prefixes, the packed index of every key. One tensor, so that one copy brings it to a device."""
    count: int
    longest_queries: int
    longest_keys: int

    @classmethod
    def of(cls, rows: Sequence[np.ndarray], owned_from: Sequence[int]) -> Runs:
        """Of rows of packed indices that own their tokens from a place on; what is owned is 0, 1, 2, ... in order."""
        keys = [len(row) for row in rows]
        queries = [length - first for length, first in zip(keys, owned_from, strict=True)]
        ends = [0, *accumulate(queries), 0, *accumulate(keys)]
        shared = rows if any(owned_from) else ()
        index = np.concatenate([np.asarray(ends), *shared]).astype(np.int32)
        return cls(torch.from_numpy(index), len(rows), max(queries, default=0), max(keys, default=0))

    def to(self, device: torch.device) -> Runs:
        return Runs(self.index.to(device), self.count, self.longest_queries, self.longest_keys)

    def attend(
        self, kernel: Kernel, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Causal attention within each run, [N, H, D]; `window`: how many keys a query sees, itself among them."""
        size = self.count + 1
        query_ends, key_ends, keys_T = self.index[:size], self.index[size : 2 * size], self.index[2 * size :]
        if keys_T.numel():
            k_NKD, v_NKD = k_NKD.index_select(0, keys_T), v_NKD.index_select(0, keys_T)
        out: Tensor = kernel(
            q_NHD,
            k_NKD,
            v_NKD,
            query_ends,
            key_ends,
            self.longest_queries,
            self.longest_keys,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=q_NHD.shape[1] != k_NKD.shape[1],
        )
        return out


def attend(
    runs: Runs, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
) -> Tensor | None:
    """Causal attention of packed rows, query [1, H, N, D], key and value [1, K, N, D] -> [1, N, H, D].

    None where there is no kernel for such tensors, and groups are to be used.
    """
    place = query.device.type
    narrow = torch.amp.is_autocast_available(place) and torch.is_autocast_enabled(place)
    dtype = torch.get_autocast_dtype(place) if narrow else query.dtype
    kernel = kernel_for(query.device, dtype, query.shape[1], key.shape[1], query.shape[3])
    if kernel is None:
        return None
    q, k, v = (tensor.to(dtype).squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    return runs.attend(kernel, q, k, v, scale, window)[None]


@lru_cache(maxsize=32)
def kernel_for(device: torch.device, dtype: torch.dtype, heads: int, groups: int, width: int) -> Kernel | None:
    """The kernel, where a device has one that has computed on it what plain attention does, gradients too; else None.

    A kernel that computes something else, or nothing, is warned of once.
    """
    if device.type != "cuda" or dtype not in _KINDS or width % 8 or width > _WIDEST:
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # a torch that has none
        return None
    if torch.cuda.get_device_capability(device) < _OLDEST or not torch.backends.cuda.is_flash_attention_available():
        return None
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            gap = disagreement(varlen_attn, device, dtype, heads, groups, width)
        fault = None if gap <= _TOLERANCE else f"it is off by {gap:.2g}"
    except (RuntimeError, TypeError, ValueError) as error:
        fault = said_by(error)
    if fault is None:
        return varlen_attn
    warnings.warn(f"attention is computed in groups, without torch's varlen_attn on {device}: {fault}", stacklevel=2)
    return None


def disagreement(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: int, groups: int, width: int
) -> float:
    """The largest gap between a kernel and `plain`, outputs and gradients, over the size of what is compared.

    Two rows that share a prefix and one that does not, of numbers of one seed.
    """
    runs = Runs.of([np.arange(9), np.r_[0:4, 9:14], np.arange(14, 21)], [0, 4, 0]).to(device)
    draw = torch.Generator().manual_seed(0)
    drawn = [torch.randn(21, number, width, generator=draw) for number in (heads, groups, groups, heads)]
    q_NHD, k_NKD, v_NKD, weight = (tensor.to(device, dtype).requires_grad_() for tensor in drawn)
    found = []
    for each in (kernel, plain):
        out = runs.attend(each, q_NHD, k_NKD, v_NKD, None, None)
        found.append([out.detach(), *torch.autograd.grad(out, (q_NHD, k_NKD, v_NKD), weight)])
    pairs = zip(*found, strict=True)
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What the kernel computes, [N, H, D] and [T, K, D] -> [N, H, D], run by run on any device in float32 or wider.

    The last query of a run stands at its last key. `window_size`: keys to the left of that place, and to the right,
    that a query sees (-1: all of them).
    """
    kind = torch.promote_types(query.dtype, torch.float32)
    ends = [each.tolist() for each in (cu_seq_q, cu_seq_k)]
    outputs = []
    for (q_from, q_to), (k_from, k_to) in zip(*(pairwise(each) for each in ends), strict=True):
        q_HLD, k_KLD, v_KLD = (
            tensor[start:stop].transpose(0, 1).to(kind)
            for tensor, start, stop in ((query, q_from, q_to), (key, k_from, k_to), (value, k_from, k_to))
        )
        share = q_HLD.shape[0] // k_KLD.shape[0] if enable_gqa else 1
        k_HLD, v_HLD = (tensor.repeat_interleave(share, dim=0) for tensor in (k_KLD, v_KLD))
        place = torch.arange(k_to - k_from, device=query.device)
        right = place[None, :] - place[k_to - k_from - (q_to - q_from) :, None]
        seen = torch.ones_like(right, dtype=torch.bool)
        for reach, distance in zip(window_size, (-right, right), strict=True):
            seen = seen if reach < 0 else seen & (distance <= reach)
        scores = q_HLD @ k_HLD.transpose(1, 2) * (query.shape[2] ** -0.5 if scale is None else scale)
        outputs.append((torch.softmax(scores.masked_fill(~seen, float("-inf")), -1) @ v_HLD).transpose(0, 1))
    return torch.cat(outputs).to(query.dtype)
