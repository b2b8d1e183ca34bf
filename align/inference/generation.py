"""Rollouts: prompts in, sampled replies with their log-probabilities out.

Own decoding loop: it samples from softmax(logits / temperature) and nothing else (a model's generation_config never
leaks in), keeps the log-probability of what it sampled, and drops finished rows from the batch. Prompts are read
packed, without padding; `align/inference/cache.py` holds what is attended to. A row's draws are a function of the
generator and of the row's number: neither other rows nor their lengths change them. `benchmarks/generate.py` measures
it against `generate`.

Shape suffixes: B rows, R rows that are read, C columns of the cache, N packed tokens, S draws of a block, D width,
V vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from align.inference.cache import BLOCK, BlockCache
from align.models.forward import packed_hidden
from align.models.own_functions import NarrowCopies
from align.models.packing import pack
from align.models.row_features import RowFeatures, reader_of
from align.models.virtual_tokens import lead_of
from align.roles import Role
from data_prep.core.errors import TrainingStopped
from data_prep.types import features_of

Draws = torch.Generator | Sequence[int] | None
"""What draws are made with: the seed of each row, or what these are drawn from."""
_DROP_SHARE = 0.25  # finished rows are dropped once they are this share of the batch


@dataclass
class Reply:
    """One sampled reply: its tokens (the end token included when it was produced) and their log-probabilities."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False
    """Whether the end token was produced within the length limit."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    max_new_tokens: int
    temperature: float = 1.0
    greedy: bool = False


class Decoder:
    """The passes of decoding, on a role's own tree, so that weights are never copied or out of date."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self._copies = NarrowCopies()

    def _read(self, prompts: Sequence[Sequence[int]], cache: BlockCache) -> tuple[Tensor, Tensor | None, Tensor]:
        """Read the prompts in one packed pass, one that several rows have once.

        Returns logits [B, V] of what follows them, the columns each row sees [B, C] unless each sees all, and the
        next positions [B].
        """
        tree = self.role.tree
        kinds = [(tuple(ids), features_of(ids), self._owner(row)) for row, ids in enumerate(prompts)]
        places = {kind: place for place, kind in enumerate(dict.fromkeys(kinds))}
        which = [places[kind] for kind in kinds]
        read = [which.index(place) for place in places.values()]
        self._entering([row for row in read for _ in prompts[row]], packed=True)
        hidden_ND = packed_hidden(tree, pack([prompts[row] for row in read]).to(tree.device), cache)
        lengths = [len(prompt) for prompt in prompts]
        which_B, length_B = torch.tensor([which, lengths], device=tree.device)
        end_R = torch.tensor([lengths[row] for row in read], device=tree.device).cumsum(0)
        lead = lead_of(tree)
        virtual, memory = (lead.tokens, lead.memory()) if lead is not None else (0, ())
        visible_BC = cache.lay_out(end_R[which_B] - length_B, length_B, virtual, memory)
        logits_BV = self.role.logits(hidden_ND[end_R - 1])[which_B].float()
        return logits_BV, visible_BC if len(set(lengths)) > 1 else None, length_B + virtual

    def _next(
        self, token_B: Tensor, position_B: Tensor, visible_BC: Tensor | None, cache: BlockCache, alive: list[int]
    ) -> Tensor:
        """Logits [B, V] of what follows one more token of each row; `alive` are the rows."""
        tree = self.role.tree
        self._entering(alive, packed=False)
        with self._copies:
            out = getattr(tree, tree.base_model_prefix)(
                input_ids=token_B[:, None],
                position_ids=position_B[:, None],
                attention_mask=None if visible_BC is None else visible_BC[:, None, None, :],
                past_key_values=cache,
                use_cache=True,
                **({} if reader_of(tree) is None else {"features": self._features(alive)}),
            )
        return self.role.logits(out.last_hidden_state[:, -1]).float()

    def _entering(self, rows: Sequence[int], packed: bool) -> None:
        """Called before a pass with the row of every token: one token of each row, or packed prompts."""

    def _owner(self, row: int) -> str | None:
        """What computes a row, where that is not one thing for all of them."""
        return None

    def _features(self, rows: Sequence[int]) -> RowFeatures | None:
        """The features of rows at work, where the role reads them."""
        raise NotImplementedError


class RolloutEngine(Decoder):
    """Decodes batches whose rows start together."""

    def __init__(self, role: Role, end_id: int) -> None:
        super().__init__(role)
        self.end_id = end_id
        self._prompts: Sequence[Sequence[int]] = ()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, draws: Draws = None) -> list[Reply]:
        """One reply per prompt, in order. `draws` makes sampling repeatable; greedy ignores it."""
        grown = deque(self.stream(prompts, sampling, draws), maxlen=1)
        return grown.pop() if grown else []

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, draws: Draws = None
    ) -> Iterator[list[Reply]]:
        """The replies as they grow: the same list after every sampled token. Closing the iterator ends the sampling."""
        training = self.role.training
        self.role.eval()
        try:
            yield from self._steps(prompts, sampling, draws)
        finally:
            self.role.train(training)

    @torch.no_grad()
    def _steps(self, prompts: Sequence[Sequence[int]], sampling: Sampling, draws: Draws) -> Iterator[list[Reply]]:
        if not prompts:
            return
        replies = [Reply() for _ in prompts]
        self._prompts = prompts
        device, cache = self.role.tree.device, BlockCache()
        alive = list(range(len(prompts)))
        logits_BV, visible_BC, position_B = self._read(prompts, cache)
        uniforms = _Uniforms(len(prompts), draws)
        for step in range(sampling.max_new_tokens):
            uniform_B = None if sampling.greedy else uniforms.at(step, alive).to(device)
            token_B, logprob_B = draw(logits_BV, sampling.temperature, uniform_B)
            self._append(replies, alive, token_B, logprob_B)
            yield replies
            keep = self._kept(replies, alive)
            if not keep or step + 1 == sampling.max_new_tokens:
                break
            if len(keep) < len(alive):
                rows, alive = torch.tensor(keep, device=device), [alive[place] for place in keep]
                cache.batch_select_indices(rows)
                token_B, position_B = token_B[rows], position_B[rows]
                visible_BC = None if visible_BC is None else visible_BC[rows]
            if visible_BC is not None:
                visible_BC = torch.cat([visible_BC, visible_BC.new_ones(len(alive), 1)], dim=1)
            logits_BV = self._next(token_B, position_B, visible_BC, cache, alive)
            position_B = position_B + 1

    def _features(self, rows: Sequence[int]) -> RowFeatures | None:
        return RowFeatures.of(self._prompts[row] for row in rows)

    def _append(self, replies: list[Reply], alive: list[int], token_B: Tensor, logprob_B: Tensor) -> None:
        drawn = torch.stack([token_B.double(), logprob_B.double()], dim=1).tolist()
        for row, (token, logprob) in zip(alive, drawn, strict=True):
            reply = replies[row]
            if not reply.finished:
                if math.isnan(logprob):
                    raise TrainingStopped("the model's logits are not finite, nothing can be drawn", code="not_finite")
                reply.ids.append(int(token))
                reply.logprobs.append(logprob)
                reply.finished = int(token) == self.end_id

    def _kept(self, replies: list[Reply], alive: list[int]) -> list[int]:
        """Places to go on with: all of them until enough rows have finished to be worth a smaller batch."""
        still_open = [place for place, row in enumerate(alive) if not replies[row].finished]
        few = len(still_open) <= (1 - _DROP_SHARE) * len(alive)
        return still_open if few else list(range(len(alive)))


def seeds_of(rows: int, generator: torch.Generator | None) -> list[int]:
    """A seed for each row: its own draw from the generator."""
    device = "cpu" if generator is None else generator.device
    return torch.randint(2**62, (rows,), generator=generator, device=device).tolist()


def streams_of(rows: int, draws: Draws) -> list[np.random.Generator]:
    """A stream of random numbers for each row, by its seed."""
    seeds = draws if isinstance(draws, Sequence) else seeds_of(rows, draws)
    return [np.random.Generator(np.random.Philox(seed)) for seed in seeds]


class _Uniforms:
    """Uniform numbers in [0, 1), of one stream per row."""

    def __init__(self, rows: int, draws: Draws) -> None:
        self._streams = streams_of(rows, draws)
        self._block_BS = torch.empty(0)

    def at(self, step: int, rows: list[int]) -> Tensor:
        """The next number of each of the rows, float64 [B]; steps are asked for in order."""
        if step % BLOCK == 0:
            self._block_BS = torch.from_numpy(np.stack([stream.random(BLOCK) for stream in self._streams]))
        return self._block_BS[rows, step % BLOCK]


def draw(logits_BV: Tensor, temperature: float, uniform_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """Next tokens [B] and their log-probabilities [B] under softmax(logits / temperature).

    A token is drawn where its uniform number falls among the cumulated probabilities (float64); without numbers it is
    the most likely one. One of probability 0 is never drawn.
    """
    probability_BV = torch.softmax(logits_BV / temperature, dim=-1)
    if uniform_B is None:
        token_B = logits_BV.argmax(-1)
    else:
        cumulated_BV = probability_BV.cumsum(-1, dtype=torch.float64)
        place_B1 = torch.searchsorted(cumulated_BV, uniform_B[:, None] * cumulated_BV[:, -1:], right=True)
        token_B = place_B1[:, 0].clamp_max(logits_BV.shape[1] - 1)
    return token_B, probability_BV.gather(1, token_B[:, None])[:, 0].log()
