"""Which rows make an optimiser step, and how they are cut into forward passes.

All of it follows from (seed, epoch, lengths): nothing needs saving, and every process knows what the others do. The
cut does not change a gradient (align/training/loop.py); with a token budget it decides how much memory a step takes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from align.training.options import TrainingOptions

Lengths = npt.NDArray[np.int64]
Places = list[int]
LOOKED_AT = 2000
"""Steps among which `largest_pass` looks."""


def batches(count: int, batch_size: int, seed: int, epoch: int) -> list[npt.NDArray[np.int64]]:
    """Row numbers of every batch of an epoch: a function of (seed, epoch) alone.

    Sizes differ by at most one and are never below `batch_size`, unless the data is.
    """
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return list(np.array_split(order, max(1, count // batch_size)))


def seed_at(seed: int, step: int, process: int) -> int:
    """The seed of what a process draws in a step: a function of these alone."""
    return ((seed + 1) * 1_000_003 + step) * 4096 + process


def in_order(lengths: Sequence[int] | Lengths, rows: int, tokens: int) -> list[Places]:
    """Consecutive rows in passes of at most so many rows and so many tokens (0: no limit; a longer row goes alone)."""
    passes: list[Places] = []
    used = 0
    for place, length in enumerate(map(int, lengths)):
        full = passes and ((rows and len(passes[-1]) == rows) or (tokens and used + length > tokens))
        if full or not passes:
            passes.append([])
            used = 0
        passes[-1].append(place)
        used += length
    return passes


def best_fit(lengths: Sequence[int] | Lengths, rows: int, tokens: int) -> list[Places]:
    """Rows in passes of at most `tokens` tokens and `rows` rows (0: no limit of rows), the pass with most tokens first.

    Best fit by decreasing length: each row goes into the fullest pass that has room for it. A row above `tokens` goes
    alone.
    """
    passes: list[Places] = []
    used: list[int] = []
    room: list[tuple[int, int]] = []  # (tokens left, pass), sorted
    known = [int(length) for length in lengths]
    for place in sorted(range(len(known)), key=lambda place: (-known[place], place)):
        length = known[place]
        found = bisect_left(room, (length, -1))
        left, number = room.pop(found) if found < len(room) else (tokens, len(passes))
        if number == len(passes):
            passes.append([])
            used.append(0)
        passes[number].append(place)
        used[number] += length
        if left > length and len(passes[number]) != rows:
            insort(room, (left - length, number))
    return [passes[number] for number in sorted(range(len(passes)), key=lambda number: -used[number])]


def cut(lengths: Sequence[int] | Lengths, options: TrainingOptions) -> list[Places]:
    """Places of the rows of each forward pass, as a stage's options say."""
    limits = (options.micro_batch_size, options.micro_tokens)
    return best_fit(lengths, *limits) if options.micro_tokens else in_order(lengths, *limits)


def shared(lengths: Lengths, processes: int) -> list[Places]:
    """Places of the rows of each process, with tokens spread evenly: the longest row goes where there is least."""
    loads = [(0, process) for process in range(processes)]
    shares: list[Places] = [[] for _ in loads]
    for place in np.argsort(-lengths, kind="stable").tolist():
        load, process = loads.pop(0)
        shares[process].append(place)
        insort(loads, (load + int(lengths[place]), process))
    return shares


def shares(lengths: Lengths, options: TrainingOptions, processes: int) -> list[Places]:
    """Places of the rows of each process: in turn, or by tokens where passes have a budget of them."""
    if options.micro_tokens:
        return shared(lengths, processes)
    return [list(range(first, len(lengths), processes)) for first in range(processes)]


@dataclass(frozen=True)
class Window:
    """The rows of one optimiser step: for each process, the row numbers of its forward passes."""

    passes: list[list[Places]]
    tokens: int
    """Packed tokens over all processes."""


@dataclass(frozen=True)
class Windows:
    """The optimiser steps of every epoch.

    Args:
        lengths: packed tokens of every training row.
    """

    lengths: Lengths
    options: TrainingOptions
    seed: int
    processes: int = 1

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.options.steps_in_epoch(len(self.lengths))

    def begins_with(self) -> int:
        """The batch that the first epoch begins with: the first, or with a token budget that of the largest pass."""
        found = batches(len(self.lengths), self.options.batch_size, self.seed, 0)
        return self._largest(found) if self.options.micro_tokens else 0

    def epoch(self, number: int, first: int, begins_with: int) -> Iterator[Window]:
        """The steps of an epoch from step `first`; the first epoch has changed batch `begins_with` with the first."""
        found = batches(len(self.lengths), self.options.batch_size, self.seed, number)
        if number == 0:
            found[0], found[begins_with] = found[begins_with], found[0]
        return map(self._window, found[first:])

    def _window(self, index: npt.NDArray[np.int64]) -> Window:
        lengths = self.lengths[index]
        every = shares(lengths, self.options, self.processes)
        passes = [[index[share][one].tolist() for one in cut(lengths[share], self.options)] for share in every]
        return Window(passes, int(lengths.sum()))

    def _largest(self, found: Sequence[npt.NDArray[np.int64]]) -> int:
        """The batch with the largest pass if one process did all: the same for any number of them."""
        most = max(self.options.micro_tokens, int(self.lengths.max(initial=0)))
        best, largest = 0, 0
        for place, index in enumerate(found):
            lengths = self.lengths[index]
            passes = cut(lengths, self.options)
            tokens = int(lengths[passes[0]].sum()) if passes else 0
            if tokens > largest:
                best, largest = place, tokens
            if largest == most:
                break
        return best


def largest_pass(lengths: Lengths, options: TrainingOptions, seed: int) -> tuple[Places, int]:
    """The rows of the pass with most tokens among the first epoch's steps, and how many passes its step has.

    Of very many steps the first `LOOKED_AT` are taken: the order of rows is random.
    """
    windows = Windows(lengths, options, seed)
    steps = min(windows.steps, options.max_steps or windows.steps, LOOKED_AT)
    found: tuple[Places, int] = [], 0
    most = -1
    for window in islice(windows.epoch(0, 0, windows.begins_with()), steps):
        for one in window.passes[0]:
            if (tokens := int(lengths[one].sum())) > most:
                most, found = tokens, (one, len(window.passes[0]))
    return found


def rows_at(rows: Sequence[Any], passes: Sequence[Places]) -> list[list[Any]]:
    """The rows of each forward pass."""
    return [[rows[place] for place in one] for one in passes]
