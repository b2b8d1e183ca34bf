"""Keys and values of rows that are being decoded: filled from one packed pass, then grown block by block.

A row's columns end where every other's end, so that a token is one more column for all of them; shorter rows begin
with columns that nobody sees. Columns are written into buffers with room for a block of further ones: the cache is
copied once a block, not once a token.

Shape suffixes: B rows, C columns held, N packed tokens, K key-value heads, D head width, P virtual tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer

from align.models.packing import Memory

BLOCK = 64
"""Columns that a buffer grows by."""


class BlockLayer(DynamicLayer):
    """One attention layer's keys and values, [B, K, C, D] each, as views of buffers with more columns."""

    keys: Any
    values: Any
    buffers: tuple[Tensor, ...]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep a pass's keys and values behind those held; all that is held."""
        if not self.is_initialized:  # the packed pass, which `lay_out` will spread over rows
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        held, stop = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if stop > self.buffers[0].shape[2]:
            self._move(self.keys, self.values)
        for buffer_BKCD, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer_BKCD[:, :, held:stop] = new
        self._show(stop)
        return self.keys, self.values

    def lay_out(self, index_BC: Tensor, before: tuple[Tensor, Tensor] | None) -> None:
        """Turn packed keys and values into rows: column c of row b is packed token `index_BC[b, c]`.

        `before` are keys and values [K, P, D] that count as the first packed tokens.
        """
        rows = []
        for number, packed in enumerate((self.keys[0], self.values[0])):
            if before is not None:
                packed = torch.cat([before[number].to(packed.dtype), packed], dim=1)
            chosen = packed.index_select(1, index_BC.reshape(-1))
            rows.append(chosen.view(packed.shape[0], *index_BC.shape, packed.shape[2]).transpose(0, 1))
        self._move(*rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Hold these rows alone."""
        self._move(self.keys[indices], self.values[indices])

    def join(self, other: BlockLayer) -> None:
        """Hold another layer's rows behind the own ones; the shorter of both begin with columns that nobody sees."""
        columns = max(self.keys.shape[2], other.keys.shape[2])
        self._move(
            torch.cat([_reaching(self.keys, columns), _reaching(other.keys, columns)]),
            torch.cat([_reaching(self.values, columns), _reaching(other.values, columns)]),
        )

    def forget(self, columns: int) -> None:
        """Hold all but so many of the first columns."""
        self._move(self.keys[:, :, columns:], self.values[:, :, columns:])

    def _move(self, keys: Tensor, values: Tensor) -> None:
        """Into buffers with room for at least one more column and at most a block of them."""
        rows, heads, held, width = keys.shape
        room = (held // BLOCK + 1) * BLOCK
        self.buffers = (
            keys.new_empty(rows, heads, room, width),
            values.new_empty(*values.shape[:2], room, values.shape[3]),
        )
        for buffer_BKCD, own in zip(self.buffers, (keys, values), strict=True):
            buffer_BKCD[:, :, :held] = own
        self._show(held)

    def _show(self, held: int) -> None:
        self.keys, self.values = (buffer_BKCD[:, :, :held] for buffer_BKCD in self.buffers)


def _reaching(held_BKCD: Tensor, columns: int) -> Tensor:
    """With columns of zeros in front, so that there are so many."""
    return pad(held_BKCD, (0, 0, columns - held_BKCD.shape[2], 0))


class BlockCache(Cache):
    """Keys and values of every layer of a model."""

    layers: list[Any]

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=BlockLayer)

    def lay_out(self, start_B: Tensor, length_B: Tensor, virtual: int, memory: Memory) -> Tensor:
        """Spread one packed pass over rows that start and are as long as said, where several may be one prompt.

        Each comes behind the `virtual` tokens that all of them share, which are the first of the packed pass, or
        `memory` has their keys and values. Returns which columns each row sees, bool [B, C].
        """
        longest = int(length_B.max())
        own_BC = torch.arange(virtual + longest, device=length_B.device) - (longest - length_B)[:, None]
        index_BC = torch.where(own_BC < virtual, own_BC.clamp_min(0), own_BC + start_B[:, None])
        for number, layer in enumerate(self.layers):
            layer.lay_out(index_BC, memory[number] if memory else None)
        return own_BC >= 0

    def join(self, other: BlockCache) -> None:
        """Hold another cache's rows behind the own ones."""
        for layer, more in zip(self.layers, other.layers, strict=True):
            layer.join(more)

    def forget(self, columns: int) -> None:
        """Hold all but so many of the first columns, which no row sees any more."""
        for layer in self.layers:
            layer.forget(columns)
