"""Rollouts: prompts in, sampled replies with their log-probabilities out.

Own decoding loop over transformers' cache: it samples from softmax(logits / temperature) and nothing else (a model's
generation_config never leaks in), keeps the log-probability of what it sampled, and drops finished rows from the batch.
`benchmarks/rollout.py` measures it against `generate`.

Shape suffixes: B rows, P padded prompt length, K cached length, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from align.models.virtual_tokens import lead_of
from align.roles import Role

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


class RolloutEngine:
    """Decodes with a role's own tree, so weights are never copied or out of date."""

    def __init__(self, role: Role, end_id: int, pad_id: int) -> None:
        self.role = role
        self.end_id = end_id
        self.pad_id = pad_id

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator | None = None
    ) -> list[Reply]:
        """One reply per prompt, in order. `generator` makes sampling repeatable; greedy ignores it."""
        grown = deque(self.stream(prompts, sampling, generator), maxlen=1)
        return grown.pop() if grown else []

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator | None = None
    ) -> Iterator[list[Reply]]:
        """The replies as they grow: the same list after every sampled token. Closing the iterator ends the sampling."""
        training = self.role.training
        self.role.eval()
        try:
            yield from self._steps(prompts, sampling, generator)
        finally:
            self.role.train(training)

    @torch.no_grad()
    def _steps(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator | None
    ) -> Iterator[list[Reply]]:
        if not prompts:
            return
        replies = [Reply() for _ in prompts]
        inputs, visible_BP, cache = self._opening(prompts)
        device = self.role.tree.device
        alive = torch.arange(len(prompts))
        held = cache.get_seq_length()
        positions_BP = (visible_BP.long().cumsum(1) - 1).clamp_min(0)[:, held:]
        mask_B1PK = _prompt_mask(visible_BP)[:, :, held:]
        for step in range(sampling.max_new_tokens):
            logits_BV = self._logits(inputs, positions_BP, mask_B1PK, cache)
            token_B, logprob_B = _draw(logits_BV, sampling, generator)
            self._append(replies, alive, token_B, logprob_B)
            yield replies
            keep = self._kept(replies, alive)
            if len(keep) == 0 or step + 1 == sampling.max_new_tokens:
                break
            if len(keep) < len(alive):
                alive, rows = alive[keep], keep.to(device)
                cache.batch_select_indices(rows)
                token_B, visible_BP, positions_BP = token_B[rows], visible_BP[rows], positions_BP[rows]
            visible_BP = torch.cat([visible_BP, torch.ones_like(visible_BP[:, :1])], dim=1)
            mask_B1PK = visible_BP[:, None, None, :]
            positions_BP = positions_BP[:, -1:] + 1
            inputs = {"input_ids": token_B[:, None]}

    def _opening(self, prompts: Sequence[Sequence[int]]) -> tuple[dict[str, Tensor], Tensor, DynamicCache]:
        """What the first forward takes, which key columns each row sees, and the cache with what stands before them."""
        lead = lead_of(self.role.tree)
        cache = DynamicCache()
        if lead is None:
            ids_BP, visible_BP = self._left_padded(prompts)
            return {"input_ids": ids_BP}, visible_BP, cache
        for layer, own in enumerate(memory := lead.memory()):
            key, value = (x.to(self.role.tree.dtype).expand(len(prompts), *x.shape) for x in own)
            cache.update(key, value, layer)
        if memory:
            ids_BP, visible_BP = self._left_padded(prompts)
            return {"input_ids": ids_BP}, F.pad(visible_BP, (lead.tokens, 0), value=True), cache
        ids_BP, visible_BP = self._left_padded([[self.pad_id] * lead.tokens + list(prompt) for prompt in prompts])
        starts_B = visible_BP.int().argmax(1)
        return {"inputs_embeds": lead.embeds(self.role.tree, ids_BP, starts_B)}, visible_BP, cache

    def _logits(self, inputs: dict[str, Tensor], positions: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        backbone = getattr(self.role.tree, self.role.tree.base_model_prefix)
        out = backbone(**inputs, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True)
        return self.role.logits(out.last_hidden_state[:, -1]).float()

    def _append(self, replies: list[Reply], alive: Tensor, token_B: Tensor, logprob_B: Tensor) -> None:
        for row, token, logprob in zip(alive.tolist(), token_B.tolist(), logprob_B.tolist(), strict=True):
            reply = replies[row]
            if not reply.finished:
                reply.ids.append(token)
                reply.logprobs.append(logprob)
                reply.finished = token == self.end_id

    def _kept(self, replies: list[Reply], alive: Tensor) -> Tensor:
        """Rows to go on with: all of them until enough have finished to be worth a smaller batch."""
        open_B = torch.tensor([not replies[row].finished for row in alive.tolist()])
        if int(open_B.sum()) <= (1 - _DROP_SHARE) * len(alive):
            return open_B.nonzero()[:, 0]
        return torch.arange(len(alive))

    def _left_padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), self.pad_id, dtype=torch.long)
        visible = torch.zeros((len(prompts), width), dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
            visible[row, width - len(prompt) :] = True
        device = self.role.tree.device
        return ids.to(device), visible.to(device)


def _prompt_mask(visible_BP: Tensor) -> Tensor:
    """Causal mask over left-padded prompts, [B, 1, P, P]; a pad sees itself, so that no row of it is empty."""
    width = visible_BP.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=visible_BP.device).tril()
    own = torch.eye(width, dtype=torch.bool, device=visible_BP.device)
    return ((causal & visible_BP[:, None, :]) | own)[:, None]


def _draw(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Next tokens [B] and their log-probabilities [B] under softmax(logits / temperature)."""
    logprobs_BV = torch.log_softmax(logits_BV / sampling.temperature, dim=-1)
    if sampling.greedy:
        token_B = logits_BV.argmax(-1)
    else:
        token_B = torch.multinomial(logprobs_BV.exp(), 1, generator=generator)[:, 0]
    return token_B, logprobs_BV.gather(1, token_B[:, None])[:, 0]
