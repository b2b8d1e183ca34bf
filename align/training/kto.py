"""Kahneman-Tversky optimisation: the loss of replies labelled good or bad, and the objective of the stage `kto`.

"KTO: Model Alignment as Prospect Theoretic Optimization", arXiv 2402.01306, eq. 7. With the log ratio h(x, y) =
log pi(y | x) - log q(y | x), s the sigmoid, z the reference point, w and v the weights of good and bad replies:

    kto                 good  w (1 - s(beta (h - z)))     bad  v (1 - s(beta (z - h)))      arXiv 2402.01306, eq. 7
    apo_zero_unpaired   good  w (1 - s(beta h))           bad  v s(beta h)                  arXiv 2408.06266, eq. 7

z = max(0, mean of h(x, y')) is an estimate of the KL of policy and reference, without gradient, over prompts x with
replies y' to other prompts. TRL, the oracle in tests, pairs them within a device's batch; here every row has its y'
once for all, the reply of the next row with another prompt, and z is the mean over the whole optimiser step, so that
neither depends on how a step is cut or spread over processes. Cost: one forward and backward of the policy, one
forward of the reference, and for z a forward of both over prompt and y'.

Shape suffixes: B rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.functional import masked_sum
from align.models.forward import packed_hidden
from align.roles import Role
from align.training.objectives import Total
from align.training.replies import Referenced, ReplyBatch, pack_replies, replies_under, reply_logprobs
from data_prep.core.errors import UserError
from data_prep.types import LabelledTokens

KTO, APO_ZERO_UNPAIRED = "kto", "apo_zero_unpaired"
LOSSES = (KTO, APO_ZERO_UNPAIRED)


@dataclass(frozen=True)
class UnpairedRow:
    """A labelled reply, and a reply to another prompt that the reference point is estimated with."""

    prompt: list[int]
    reply: list[int]
    good: bool
    id: str
    other: list[int]


class Mismatched(Sequence[UnpairedRow]):
    """Labelled replies, each beside the reply of the next row of `pool` whose prompt is another."""

    def __init__(self, rows: Sequence[LabelledTokens], pool: Sequence[LabelledTokens]) -> None:
        self.rows = rows
        self.pool = pool
        self.others = next_unlike([_key(row) for row in rows], [_key(row) for row in pool])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        row = self.rows[place]
        return UnpairedRow(row.prompt, row.reply, row.good, row.id, self.pool[int(self.others[place])].reply)

    def __iter__(self) -> Iterator[UnpairedRow]:
        return (self[place] for place in range(len(self)))


@dataclass
class LabelledBatch(ReplyBatch):
    """Replies with their labels, and the same prompts with replies to other prompts, for the reference point."""

    good_B: Tensor
    others: ReplyBatch | None

    def to(self, device: torch.device) -> LabelledBatch:
        """The batch on `device`; the others stay, as they have been read before (`survey`)."""
        moved = super().to(device)
        assert isinstance(moved, LabelledBatch)
        return replace(moved, good_B=self.good_B.to(device))


def _key(row: LabelledTokens) -> int:
    return hash(tuple(row.prompt))  # of whole numbers: the same in every process


def next_unlike(keys: Sequence[int], pool: Sequence[int]) -> np.ndarray:
    """For every key the first place of `pool`, from its own place on and around its end, that holds another key.

    Raises:
        UserError: there is none.
    """
    count = len(pool)
    far = np.arange(2 * count)  # the next place that differs from the one at hand
    for place in range(2 * count - 2, -1, -1):
        far[place] = place + 1 if pool[place % count] != pool[(place + 1) % count] else far[place + 1]
    found = []
    for place, key in enumerate(keys):
        at = place % count
        at = int(far[at]) % count if pool[at] == key else at
        if pool[at] == key:
            raise UserError(
                "the training rows have a single prompt, and KTO's reference point needs replies to another",
                code="one_prompt",
                hint="give rows with other prompts, or set stages.STAGE.loss_type=apo_zero_unpaired",
            )
        found.append(at)
    return np.array(found, dtype=np.int64)


def unpaired_loss(loss_type: str, ratio_B: Tensor, good_B: Tensor, point: Tensor | float, beta: float) -> Tensor:
    """The loss of every reply, unweighted, [B]: 1 - s(beta (h - z)) of good ones, 1 - s(beta (z - h)) of bad ones."""
    point = point if loss_type == KTO else 0.0
    sign_B = torch.where(good_B, 1.0, -1.0).to(ratio_B.dtype)
    return torch.sigmoid(-beta * sign_B * (ratio_B - point))


class KahnemanTversky(Referenced):
    """Summed loss over labelled replies, and what policy and reference think of good and bad ones."""

    def __init__(
        self,
        role: Role,
        reference: Role,
        loss_type: str = KTO,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
    ) -> None:
        super().__init__(role, reference)
        self.loss_type = loss_type
        self.beta = beta
        self.weights = (desirable_weight, undesirable_weight)
        self.sft_weight = 0.0
        """Weight of good replies' negative log-likelihood by token, as in `DirectPreference`."""
        self.point = 0.0
        """z of the rows at hand."""
        self.shares = (0.0, 0.0)
        """The shares of good and of bad replies among them."""

    def collate(self, rows: Sequence[UnpairedRow]) -> ReplyBatch:
        """Every prompt with its reply, and apart from them every prompt with a reply to another."""
        prompts, ids = [row.prompt for row in rows], [row.id for row in rows]
        own = pack_replies(prompts, [(row.reply,) for row in rows], ids)
        others = pack_replies(prompts, [(row.other,) for row in rows], ids) if self.loss_type == KTO else None
        return LabelledBatch(**vars(own), good_B=torch.tensor([row.good for row in rows]), others=others)

    @torch.no_grad()
    def survey(self, window: Sequence[LabelledBatch], total: Total) -> None:
        """The reference point, and how many replies are good, over all rows of a step or an evaluation."""
        device = self.role.tree.device
        rows, good, distance = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(3))
        for batch in window:
            rows += batch.weight
            good += batch.good_B.sum()
            if batch.others is not None:
                others = batch.others.to(device)
                distance += (replies_under(self.role, others) - replies_under(self.reference, others)).double().sum()
        rows, good, distance = total(rows), total(good), total(distance)
        self.point = max(0.0, float(distance / rows))
        self.shares = (float(good / rows), float(1 - good / rows))

    def forward(self, batch: LabelledBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss; sums of rewards and log-probabilities that give means over good and over bad replies."""
        good_B = batch.good_B
        hidden_MD = packed_hidden(self.role.tree, batch.packed)[batch.source_M]
        logprobs_B = reply_logprobs(self.role, hidden_MD, batch)
        ratio_B = logprobs_B - replies_under(self.reference, batch)
        loss_B = unpaired_loss(self.loss_type, ratio_B, good_B, self.point, self.beta)
        loss = (loss_B * torch.where(good_B, *self.weights)).sum()
        rewards_B = self.beta * ratio_B.detach()
        right_B = torch.where(good_B, ratio_B > self.point, ratio_B < self.point)
        numbers = {
            "kl": torch.full((), self.point * batch.weight, dtype=torch.float64, device=loss.device),
            "rewards/accuracies": right_B.float().sum() + 0.5 * (ratio_B == self.point).float().sum(),
            "max_log_ratio": ratio_B.detach().abs().max(),
        }
        for side, own_B, share in zip(("chosen", "rejected"), (good_B, ~good_B), self.shares, strict=True):
            if share:
                numbers[f"rewards/{side}"] = masked_sum(rewards_B, own_B) / share
                numbers[f"logps/{side}"] = masked_sum(logprobs_B.detach(), own_B) / share
        if self.sft_weight and self.shares[0]:
            likelihood = -masked_sum(logprobs_B / batch.lengths_R, good_B)
            loss = loss + self.sft_weight * likelihood
            numbers["nll"] = likelihood.detach() / self.shares[0]
        if all(self.shares):
            numbers["rewards/margins"] = numbers["rewards/chosen"] - numbers["rewards/rejected"]
        return loss, numbers
