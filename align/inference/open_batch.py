"""A batch whose rows come and go between tokens: what a server decodes with.

`RolloutEngine` starts all rows of a batch together. Here new prompts are read in one packed pass and join the rows at
work; a row that has ended, or whose reader has left, makes room. Every row is drawn with settings and random numbers of
its own, and gets the tokens that `RolloutEngine` gives it alone.

Shape suffixes: B rows, C columns of the cache, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from align.inference.cache import BlockCache
from align.inference.generation import Decoder, Reply, draw
from align.inference.mixed_batch import Mixed
from align.models.row_features import RowFeatures
from align.roles import Role
from data_prep.core.errors import TrainingStopped

Route = Callable[[Sequence[str | None], int], None]
"""Says which adapter each row (dimension 0) or packed token (dimension 1) of the coming pass belongs to."""


@dataclass(frozen=True)
class RowSampling:
    """How the tokens of one row are drawn, and where it ends."""

    max_new_tokens: int
    ends: frozenset[int]
    """Ids that end it; they stand in the reply."""
    temperature: float = 1.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Share of the probability that is drawn from: the likeliest tokens that reach it together."""
    logprobs: int | None = None
    """Keep each token's log-probability, at temperature 1, and so many of the likeliest tokens."""


@dataclass(eq=False)
class Row:
    """A reply that is asked for, while it grows. Others read it; only the batch writes, `left` excepted."""

    prompt: Sequence[int]
    sampling: RowSampling
    stream: np.random.Generator
    """The row's random numbers."""
    adapter: str | None = None
    """Whose it is; None is the base."""
    grew: Callable[[], None] = lambda: None
    """Called after every token and at the end, in the thread that computes."""
    reply: Reply = field(default_factory=Reply)
    likeliest: list[list[tuple[int, float]]] = field(default_factory=list)
    """Of every token: the likeliest ids there, with their log-probabilities."""
    over: bool = False
    problem: Exception | None = None
    left: bool = False
    """Whoever asked needs no more."""

    def end(self, problem: Exception | None = None) -> None:
        """No more tokens will come."""
        self.problem, self.over = problem, True
        self.grew()


class OpenBatch(Decoder):
    """The rows that one role computes."""

    def __init__(self, role: Role, route: Route | None = None) -> None:
        super().__init__(role)
        self.rows: list[Row] = []
        self._route = route
        self._entered: list[Row] = []
        self._held: list[int] = []
        """Columns of the cache that each row sees: its tokens but the last, and the role's virtual ones."""
        self._cache = BlockCache()

    @classmethod
    def of(cls, mixed: Mixed, adapter: str | None) -> OpenBatch:
        """The batch for the rows of an adapter, and of all others that the same role computes."""
        role = mixed.role_of(adapter)
        return cls(role, mixed.route if role is mixed.role else None)

    @torch.no_grad()
    def admit(self, rows: Sequence[Row]) -> None:
        """Read the prompts of new rows in one pass and draw the first token of each."""
        cache, self._entered = BlockCache(), list(rows)
        logits_BV, _, position_B = self._read([row.prompt for row in rows], cache)
        self._grow(rows, logits_BV)
        self._drop()
        if self.rows:
            self._cache.join(cache)
        else:
            self._cache = cache
        self.rows += rows
        self._held += position_B.tolist()
        self._drop()

    @torch.no_grad()
    def step(self) -> None:
        """Draw one more token of every row."""
        device, columns = self.role.tree.device, max(self._held) + 1
        held_B = torch.tensor(self._held, device=device)
        token_B = torch.tensor([row.reply.ids[-1] for row in self.rows], device=device)
        visible_BC = None
        if min(self._held) < max(self._held):
            visible_BC = torch.arange(columns, device=device) >= columns - 1 - held_B[:, None]
        self._entered = self.rows
        logits_BV = self._next(token_B, held_B, visible_BC, self._cache, list(range(len(self.rows))))
        self._held = [held + 1 for held in self._held]
        self._grow(self.rows, logits_BV)
        self._drop()

    def end(self, problem: Exception) -> None:
        """Every row ends with a problem."""
        rows, self.rows, self._held, self._cache = self.rows, [], [], BlockCache()
        for row in rows:
            row.end(problem)

    def _entering(self, rows: Sequence[int], packed: bool) -> None:
        if self._route is not None:
            self._route([self._entered[row].adapter for row in rows], int(packed))

    def _owner(self, row: int) -> str | None:
        return self._entered[row].adapter

    def _features(self, rows: Sequence[int]) -> RowFeatures | None:
        return RowFeatures.of(self._entered[row].prompt for row in rows)

    def _grow(self, rows: Sequence[Row], logits_BV: Tensor) -> None:
        """Give every row its next token."""
        token_B, chance_B = _drawn(rows, logits_BV)
        told: list[list[tuple[int, float]]] = [[] for _ in rows]
        if any(row.sampling.logprobs is not None for row in rows):
            told = _told(rows, torch.log_softmax(logits_BV, dim=-1), token_B)
        drawn = zip(rows, token_B.tolist(), chance_B.tolist(), told, strict=True)
        for row, token, chance, likeliest in drawn:
            if math.isnan(chance):
                row.end(TrainingStopped("the model's logits are not finite, nothing can be drawn", code="not_finite"))
                continue
            if likeliest:
                row.reply.logprobs.append(likeliest[0][1])
                row.likeliest.append(likeliest[1:])
            row.reply.ids.append(token)
            row.reply.finished = token in row.sampling.ends
            if row.reply.finished or len(row.reply.ids) == row.sampling.max_new_tokens:
                row.end()
            else:
                row.grew()

    def _drop(self) -> None:
        """Make room of rows that have ended or whose reader has left, and of columns that nobody sees."""
        keep = [place for place, row in enumerate(self.rows) if not (row.over or row.left)]
        if len(keep) == len(self.rows):
            return
        columns = max(self._held)
        self.rows, self._held = [self.rows[place] for place in keep], [self._held[place] for place in keep]
        if not keep:
            self._cache = BlockCache()
            return
        self._cache.batch_select_indices(torch.tensor(keep, device=self.role.tree.device))
        if max(self._held) < columns:
            self._cache.forget(columns - max(self._held))


def _drawn(rows: Sequence[Row], logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Next tokens [B], each drawn as its row asks, and numbers [B] that are NaN where nothing can be drawn."""
    per_row = partial(torch.tensor, device=logits_BV.device)
    top_p_B = per_row([row.sampling.top_p for row in rows])
    greedy_B = per_row([row.sampling.temperature == 0 for row in rows])
    warmth_B = per_row([row.sampling.temperature or 1.0 for row in rows])
    likeliest_B = logits_BV.argmax(-1)
    if bool(greedy_B.all()):
        return likeliest_B, logits_BV.amax(-1)
    scaled_BV = logits_BV / warmth_B[:, None]
    if any(row.sampling.top_p < 1 for row in rows):
        scaled_BV = _nucleus(scaled_BV, top_p_B)
    uniform_B = per_row([row.stream.random() for row in rows], dtype=torch.float64)
    token_B, logprob_B = draw(scaled_BV, 1.0, uniform_B)
    return torch.where(greedy_B, likeliest_B, token_B), logprob_B


def _nucleus(logits_BV: Tensor, top_p_B: Tensor) -> Tensor:
    """Logits [B, V] without the tokens behind the likeliest ones that have `top_p` of the probability together."""
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
    share_BV = sorted_BV.softmax(-1)
    before_BV = share_BV.cumsum(-1) - share_BV
    cut_BV = (before_BV >= top_p_B[:, None]) & (top_p_B[:, None] < 1)
    cut_BV[:, 0] = False  # a share may be too small for a float32
    return logits_BV.masked_fill(torch.zeros_like(cut_BV).scatter(1, order_BV, cut_BV), float("-inf"))


def _told(rows: Sequence[Row], logprob_BV: Tensor, token_B: Tensor) -> list[list[tuple[int, float]]]:
    """Of every row that keeps them: (id, log-probability) of its token, then of the likeliest ones; else nothing."""
    most = max(row.sampling.logprobs or 0 for row in rows)
    own_B = logprob_BV.gather(1, token_B[:, None])[:, 0].tolist()
    value_BK, id_BK = logprob_BV.topk(min(most, logprob_BV.shape[1]), dim=-1)
    found = []
    for place, (row, token) in enumerate(zip(rows, token_B.tolist(), strict=True)):
        top = list(zip(id_BK[place].tolist(), value_BK[place].tolist(), strict=True))
        asked = row.sampling.logprobs
        found.append([] if asked is None else [(token, own_B[place]), *top[:asked]])
    return found
