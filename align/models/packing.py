"""Packed batches: many sequences laid end to end in one row, without padding and without dense attention masks.

Linear layers see the packed tokens once. Attention runs per group of sequences of similar length: a group gathers its
rows (right-padded with any token: a causal row never looks right), so no mask is ever built. Sequences that share a
prefix store its tokens once; each of them still attends to it. Where a kernel takes rows of any length (`varlen`), one
call of it does for all groups.

`benchmarks/attention.py` measures it against padded and dense block masks.

Shape suffixes: N packed tokens, R rows of a group, L longest row of a group, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from align.models import varlen
from align.models.row_features import RowFeatures

ATTENTION = "align"
Memory = tuple[tuple[Tensor, Tensor], ...]
"""Per layer, keys and values [K, P, D] of P virtual tokens that every row sees."""
_SHORTEST_SHARE = 0.75  # rows shorter than this share of a group's longest row open a new group


@dataclass(frozen=True)
class Layout:
    """How packed positions form sequences: what attention needs to know about a packed row."""

    rows_RL: tuple[Tensor, ...]
    """One int64 tensor per group: packed index of every token of every row (padding repeats index 0)."""
    scatter_N: Tensor
    """For every packed token, the place of its result in the groups' concatenated outputs."""
    memory: Memory = ()
    runs: varlen.Runs | None = None
    """The same rows for a kernel of rows of any length; none behind virtual tokens."""

    def to(self, device: torch.device) -> Layout:
        """The layout on `device`, in one copy and one for the runs."""
        if self.scatter_N.device == device:
            return self
        parts = [*self.rows_RL, self.scatter_N]
        flat = torch.cat([part.reshape(-1) for part in parts]).to(device)
        moved = [own.view(part.shape) for own, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]
        return Layout(tuple(moved[:-1]), moved[-1], self.memory, None if self.runs is None else self.runs.to(device))

    def lengths_N(self) -> Tensor:
        """Length of every packed token's row, int64; a shared prefix counts with the first of its rows."""
        groups = []
        for rows_RL in self.rows_RL:
            own_R = (rows_RL != 0).sum(1) + (rows_RL[:, 0] == 0)  # padding repeats index 0
            groups.append(own_R[:, None].expand(rows_RL.shape).reshape(-1))
        return torch.cat(groups)[self.scatter_N]


@dataclass(frozen=True)
class Packed:
    """A packed row of N tokens: ids and positions of shape [1, N], and the layout that separates the sequences."""

    ids_1N: Tensor
    positions_1N: Tensor
    layout: Layout
    features: RowFeatures | None = None
    """Those of the sequences, where there are any; none behind virtual tokens, whose adapters read none."""

    def to(self, device: torch.device) -> Packed:
        features = None if self.features is None else self.features.to(device)
        return Packed(self.ids_1N.to(device), self.positions_1N.to(device), self.layout.to(device), features)

    @property
    def tokens(self) -> int:
        """Number of packed tokens."""
        return int(self.ids_1N.shape[1])

    def after(self, count: int) -> Packed:
        """The same sequences behind `count` tokens that all of them share; these stand first and have id 0."""
        ids = F.pad(self.ids_1N, (count, 0))
        shared = torch.arange(count, device=ids.device)
        rows: list[Tensor] = []
        scatter_N = self.layout.scatter_N.clone()
        offset = 0
        for rows_RL in self.layout.rows_RL:
            number, longest = rows_RL.shape
            inside = (self.layout.scatter_N >= offset) & (self.layout.scatter_N < offset + number * longest)
            which = (self.layout.scatter_N - offset).div(longest, rounding_mode="floor") + 1
            before = sum(r.numel() for r in rows) - offset
            scatter_N = torch.where(inside, self.layout.scatter_N + before + which * count, scatter_N)
            rows.append(torch.cat([shared.expand(number, count), rows_RL + count], dim=1))
            offset += rows_RL.numel()
        positions = torch.cat([shared, self.positions_1N[0] + count])[None]
        return Packed(
            ids,
            positions,
            replace(self.layout, rows_RL=tuple(rows), scatter_N=torch.cat([shared, scatter_N]), runs=None),
        )

    def remembering(self, count: int, memory: Memory) -> Packed:
        """The same tokens, `count` positions later, with keys and values of that many virtual tokens before them."""
        return Packed(self.ids_1N, self.positions_1N + count, replace(self.layout, memory=memory, runs=None))


def pack(sequences: Sequence[Sequence[int]]) -> Packed:
    """Pack token sequences end to end. The i-th sequence starts at the sum of the lengths before it."""
    lengths = [len(sequence) for sequence in sequences]
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    rows = [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    positions = np.concatenate([np.arange(length) for length in lengths])
    ids = np.fromiter((token for sequence in sequences for token in sequence), dtype=np.int64)
    features = RowFeatures.of(sequences)
    packed = _packed(ids, positions, rows, [0] * len(rows))
    return packed if features is None else replace(packed, features=features.packed(lengths))


def pack_branches(prefixes: Sequence[Sequence[int]], branches: Sequence[Sequence[Sequence[int]]]) -> Packed:
    """Pack prefixes, each followed by its branches; a branch continues its prefix and does not see its siblings.

    Order of tokens: prefix 0, its branches, prefix 1, its branches, ... A prefix is stored and computed once; its
    branches have its features.
    """
    ids: list[int] = []
    positions: list[int] = []
    rows: list[np.ndarray] = []
    owned_from: list[int] = []
    lengths: list[int] = []
    for prefix, family in zip(prefixes, branches, strict=True):
        prefix_index = np.arange(len(ids), len(ids) + len(prefix))
        ids.extend(prefix)
        positions.extend(range(len(prefix)))
        lengths.append(len(prefix) + sum(map(len, family)))
        for number, branch in enumerate(family):
            rows.append(np.concatenate([prefix_index, np.arange(len(ids), len(ids) + len(branch))]))
            owned_from.append(0 if number == 0 else len(prefix))
            ids.extend(branch)
            positions.extend(range(len(prefix), len(prefix) + len(branch)))
    features = RowFeatures.of(prefixes)
    packed = _packed(np.asarray(ids, dtype=np.int64), np.asarray(positions), rows, owned_from)
    return packed if features is None else replace(packed, features=features.packed(lengths))


def _packed(ids: np.ndarray, positions: np.ndarray, rows: list[np.ndarray], owned_from: list[int]) -> Packed:
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    groups: list[Tensor] = []
    scatter = np.empty(len(ids), dtype=np.int64)
    offset = 0
    start = 0
    while start < len(order):
        longest = len(rows[order[start]])
        stop = start
        while stop < len(order) and len(rows[order[stop]]) >= _SHORTEST_SHARE * longest:
            stop += 1
        block = np.zeros((stop - start, longest), dtype=np.int64)
        for place, which in enumerate(order[start:stop]):
            row, first = rows[which], owned_from[which]
            block[place, : len(row)] = row
            scatter[row[first:]] = offset + place * longest + np.arange(first, len(row))
        groups.append(torch.from_numpy(block))
        offset += block.size
        start = stop
    layout = Layout(tuple(groups), torch.from_numpy(scatter), runs=varlen.Runs.of(rows, owned_from))
    return Packed(torch.from_numpy(ids)[None], torch.from_numpy(positions.astype(np.int64))[None], layout)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention function for transformers' registry. With a layout: packed rows; without: a plain masked batch.

    query [B, H, T, D], key and value [B, K, T', D] with K dividing H. Returns ([B, T, H, D], None).
    A 4-dimensional `attention_mask` is used as given; without one and without a layout attention is causal.
    `softcap` bounds scores (Gemma 2), `s_aux` [H] is one score per head that takes attention to nothing (gpt-oss).
    """
    how = _Scoring(scaling, dropout, softcap, s_aux)
    if layout is None:
        return _unpacked(how, query, key, value, attention_mask, sliding_window), None
    if layout.runs is not None and how.is_plain:
        out = varlen.attend(layout.runs, query, key, value, scaling, sliding_window)
        if out is not None:
            return out, None
    q_NHD, k_NHD, v_NHD = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    outputs = []
    for rows_RL in layout.rows_RL:
        size = rows_RL.shape
        flat = rows_RL.reshape(-1)
        q, k, v = (
            tensor.index_select(0, flat).view(*size, *tensor.shape[1:]).transpose(1, 2)
            for tensor in (q_NHD, k_NHD, v_NHD)
        )
        lead = 0
        if layout.memory:
            remembered = layout.memory[int(module.layer_idx)]  # type: ignore[arg-type]
            k, v = (
                torch.cat([own.to(x.dtype).expand(size[0], *own.shape), x], dim=2)
                for own, x in zip(remembered, (k, v), strict=True)
            )
            lead = remembered[0].shape[1]
        mask = _window_mask(size[1], sliding_window, q.device, lead)
        out = _product(how, q, k, v, mask, causal=mask is None)
        outputs.append(out.transpose(1, 2).reshape(-1, *q_NHD.shape[1:]))
    merged = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return merged.index_select(0, layout.scatter_N)[None], None


def _unpacked(
    how: _Scoring, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, window: int | None
) -> Tensor:
    """Attention of a batch whose queries are the last of its keys, [B, T, H, D].

    One query per row reads each key-value head once for all query heads that share it, and of a window's keys alone.
    """
    rows, heads, queries, width = query.shape
    groups, keys = key.shape[1:3]
    if queries > 1:
        mask = _window_mask(queries, window, query.device, keys - queries) if mask is None else mask
        return _product(how, query, key, value, mask, causal=mask is None).transpose(1, 2)
    if window is not None and keys > window:
        key, value = key[:, :, -window:], value[:, :, -window:]
        mask = None if mask is None else mask[..., -window:]
    out = _product(how, query.reshape(rows, groups, -1, width), key, value, mask, causal=False)
    return out.reshape(rows, 1, heads, -1)


@dataclass(frozen=True)
class _Scoring:
    """How scores become weights, besides the mask."""

    scale: float | None
    dropout: float
    softcap: float | None
    sink_H: Tensor | None

    @property
    def is_plain(self) -> bool:
        """Whether scores become weights by a softmax alone."""
        return not self.dropout and self.softcap is None and self.sink_H is None


def _product(how: _Scoring, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """softmax(query key^T) value, [B, H, T, D]; H query heads share K key-value heads.

    The kernel knows neither caps nor sinks: with them, scores are made. Sinks are of H heads, or of [H, T] where the
    queries of one token take the place of T.
    """
    if how.softcap is None and how.sink_H is None:
        return F.scaled_dot_product_attention(
            query, key, value, mask, how.dropout, causal, scale=how.scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    share = query.shape[1] // key.shape[1]
    key, value = _repeat_heads(key, share), _repeat_heads(value, share)
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if how.scale is None else how.scale)
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    if how.sink_H is not None:
        sink = how.sink_H.to(scores.dtype).view(1, scores.shape[1], -1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., : key.shape[2]].to(value.dtype)
    return F.dropout(weights, how.dropout) @ value


def _repeat_heads(tensor: Tensor, share: int) -> Tensor:
    return tensor if share == 1 else tensor.repeat_interleave(share, dim=1)


def _window_mask(length: int, window: int | None, device: torch.device, lead: int = 0) -> Tensor | None:
    """Causal mask [L, P + L] of rows behind `lead` virtual tokens, or of a sliding window shorter than the row."""
    keys = lead + length
    if not lead and (window is None or length <= window):
        return None
    index = torch.arange(keys, device=device)
    distance = index[lead:, None] - index[None, :]
    return (distance >= 0) & (distance < (window or keys))


AttentionInterface.register(ATTENTION, attend)
