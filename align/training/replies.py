"""Whole replies and their log-probabilities: what every preference objective is made of.

    log pi(y | x) = sum over t of log pi(y_t | x, y_<t)

A prompt is packed and computed once for all its replies. Log-probabilities are float32 sums; a reference is another
role over the same packed row, so that where policy and reference are one function their difference is exactly 0.

Shape suffixes: N packed tokens, M reply tokens, R replies, L tokens of the longest reply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from align.models.forward import packed_hidden
from align.models.packing import Packed, pack_branches
from align.roles import Role, chosen_logprobs
from align.training.objectives import Objective

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass
class ReplyBatch:
    """Packed prompts, each followed by its replies; `source_M` is where each reply token is predicted."""

    packed: Packed
    source_M: Tensor
    targets_M: Tensor
    lengths_R: Tensor
    """Tokens of every reply, end token included."""
    longest: int
    """Tokens of the longest reply."""
    weight: float
    """Rows: what the summed loss is divided by."""
    ids: Sequence[str]

    def to(self, device: torch.device) -> ReplyBatch:
        """The batch on `device`."""
        return replace(
            self,
            packed=self.packed.to(device),
            source_M=self.source_M.to(device),
            targets_M=self.targets_M.to(device),
            lengths_R=self.lengths_R.to(device),
        )

    def read(self) -> tuple[Tensor, Tensor | float]:
        """Packed positions whose hidden states the loss reads, and their shares of `weight`."""
        share_R = self.weight / len(self.lengths_R) / self.lengths_R
        return self.source_M, torch.repeat_interleave(share_R, self.lengths_R)


def pack_replies(
    prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[Sequence[int]]], ids: Sequence[str]
) -> ReplyBatch:
    """Pack every prompt once, followed by its replies; replies are never empty."""
    packed = pack_branches(prompts, replies)
    sources, targets, lengths = [], [], []
    start = 0
    for prompt, family in zip(prompts, replies, strict=True):
        last = start + len(prompt) - 1
        start += len(prompt)
        for reply in family:
            own = np.arange(start, start + len(reply))
            targets.append(own)
            sources.append(np.concatenate([[last], own[:-1]]))
            lengths.append(len(reply))
            start += len(reply)
    index = torch.from_numpy(np.concatenate(targets))
    source = torch.from_numpy(np.concatenate(sources))
    return ReplyBatch(
        packed, source, packed.ids_1N[0, index], torch.tensor(lengths), max(lengths), float(len(prompts)), list(ids)
    )


def reply_logprobs(role: Role, hidden_MD: Tensor, batch: ReplyBatch) -> Tensor:
    """Summed log-probability of every reply under a role, [R], float32, from its hidden states before every token."""
    logprobs_M = chosen_logprobs(role, hidden_MD, batch.targets_M)
    places_L = torch.arange(batch.longest, device=logprobs_M.device)
    mask_RL = places_L < batch.lengths_R[:, None]
    return torch.zeros_like(mask_RL, dtype=logprobs_M.dtype).masked_scatter(mask_RL, logprobs_M).sum(1)


@torch.no_grad()
def replies_under(role: Role, batch: ReplyBatch) -> Tensor:
    """Summed log-probability of every reply under a role, [R], without gradients."""
    return reply_logprobs(role, packed_hidden(role.tree, batch.packed)[batch.source_M], batch)


class Referenced(Objective):
    """An objective over the log ratio of a policy to a frozen reference, which is never in training mode."""

    def __init__(self, role: Role, reference: Role) -> None:
        super().__init__()
        self.role = role
        self.reference = reference.freeze()

    def train(self, mode: bool = True) -> Self:
        """Training mode of the policy alone."""
        super().train(mode)
        self.reference.eval()
        return self
