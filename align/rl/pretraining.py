"""The pretraining loss that may be mixed into PPO's: conversations beside the replies of every minibatch ("PPO-ptx").

    loss    L_PPO + ptx_coef L_ptx                                        arXiv 2203.02155, eq. 2, where it is gamma
    L_ptx   mean of -log pi(z_t | z_<t) over the supervised tokens of the minibatch's conversations z

Every reply of an update has one conversation beside it, drawn by seed and update, in all of its passes. The mean is
that of the whole minibatch over all processes, so it does not depend on how a minibatch is cut. Temperature 1, as in
supervised tuning. The same elsewhere: `unsupervised_dataset` of DeepSpeed-Chat, `ptx_coef` of OpenRLHF. Costs another
forward and backward of the policy, over as many rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.inference.scoring import ResponseBatch
from align.rl.actor_critic import ActorCritic, ExperienceRow, PPOLoss
from align.roles import Role
from align.training.objectives import LanguageModeling, SupervisedBatch, Total
from data_prep.prepare.arrow_rows import lengths_of
from data_prep.types import Tokens


@dataclass
class MixedRow(ExperienceRow):
    """A reply, and the conversation beside it as `Tokens` has it."""

    ids: Sequence[int] = ()
    mask: Sequence[bool] = ()
    weights: Sequence[float] | None = None


@dataclass
class MixedBatch(ResponseBatch):
    """Replies, and the conversations beside them."""

    beside: SupervisedBatch

    def to(self, device: torch.device) -> MixedBatch:
        """The batch on `device`."""
        return MixedBatch(**vars(super().to(device)), beside=self.beside.to(device))


@dataclass(frozen=True)
class Pretraining:
    """The conversations that are mixed in."""

    rows: Sequence[Tokens]
    seed: int

    def beside(self, replies: Sequence[ExperienceRow], update: int) -> list[ExperienceRow]:
        """The replies of an update (from 0), each with a conversation; none comes twice where there are enough."""
        drawn = np.random.default_rng([self.seed, update, 0, 1])
        places = drawn.choice(len(self.rows), len(replies), replace=len(self.rows) < len(replies))
        return [_mixed(reply, self.rows[int(place)]) for reply, place in zip(replies, places, strict=True)]

    def longest(self, replies: Sequence[ExperienceRow]) -> list[ExperienceRow]:
        """The replies, with the longest conversations."""
        places = np.argsort(-lengths_of(self.rows), kind="stable")
        return [_mixed(reply, self.rows[int(places[i % len(places)])]) for i, reply in enumerate(replies)]


def _mixed(reply: ExperienceRow, row: Tokens) -> MixedRow:
    own = {field.name: getattr(reply, field.name) for field in fields(ExperienceRow)}
    return MixedRow(**own, ids=row.ids, mask=row.mask, weights=row.weights)


class MixedActorCritic(ActorCritic):
    """Policy and value under PPO's loss, with the pretraining loss of the policy mixed in."""

    def __init__(self, policy: Role, value: Role | None, loss: PPOLoss, coef: float) -> None:
        super().__init__(policy, value, loss)
        self.coef = coef
        self._share = 1.0  # reply tokens of the minibatch over supervised ones: what makes its sum a mean

    def collate(self, rows: Sequence[Any]) -> MixedBatch:
        """Pack replies, and apart from them the conversations."""
        tokens = [Tokens(row.ids, row.mask, row.id, row.weights) for row in rows]
        beside = LanguageModeling(self.policy).collate(tokens)
        return MixedBatch(**vars(super().collate(rows)), beside=beside)

    def survey(self, window: Sequence[MixedBatch], total: Total) -> None:
        """Count the tokens of the minibatch."""
        own = [sum(batch.weight for batch in window), sum(batch.beside.weight for batch in window)]
        replies, beside = total(torch.tensor(own, dtype=torch.float64, device=self.policy.tree.device)).tolist()
        self._share = replies / beside

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """PPO's loss and numbers, and the policy's on conversations where it is trained."""
        loss, numbers = super().forward(batch)
        if self.warming or not self.training:
            return loss, numbers
        summed, _ = LanguageModeling(self.policy)(batch.beside)
        mean = summed * self._share
        return loss + self.coef * mean, {**numbers, "policy/ptx_loss": mean.detach()}
