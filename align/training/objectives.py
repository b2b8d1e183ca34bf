"""What the supervised stages minimise: next-token loss on chosen tokens, and the pairwise loss of a reward model.

Both run on packed rows. The language-model head is computed only where a token is supervised; a preference pair
computes its prompt once for both replies.

Shape suffixes: N packed tokens, M supervised tokens, P pairs, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from align.models.forward import packed_hidden
from align.models.packing import Packed, pack, pack_branches
from align.roles import Role, chosen_logprobs
from data_prep.types import PairTokens, Tokens
from reward.loss import bradley_terry


class Batch(Protocol):
    """What the loop needs to know about a micro-batch."""

    packed: Packed
    """Its rows, as they go through the model."""
    weight: float
    """Units (tokens, pairs) its summed loss is over."""
    ids: Sequence[str]
    """Names of its rows, for error messages."""

    def to(self, device: torch.device) -> Batch: ...


Total = Callable[[Tensor], Tensor]
"""A number of this process -> its sum over all processes."""


class Objective(nn.Module):
    """A module whose forward turns a micro-batch into a summed loss and summed numbers.

    Numbers whose name starts with `max_` are combined by maximum, all others by sum; a number `loss` is what is
    logged in place of what is minimised.
    """

    def survey(self, window: Sequence[Any], total: Total) -> None:
        """See all micro-batches of a step, or of an evaluation, before the first is computed; they lie on the CPU.

        For losses that need to know something of all their rows; it keeps what it finds.
        """

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed loss and numbers of a micro-batch."""
        raise NotImplementedError

    def collate(self, rows: Sequence[Any]) -> Batch:
        """Rows to one micro-batch, on the CPU."""
        raise NotImplementedError

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Groups of trainable parameters whose gradient norms are clipped apart."""
        return [[p for p in self.parameters() if p.requires_grad]]


@dataclass
class SupervisedBatch:
    """Packed sequences and the positions whose next token is supervised.

    `weights_M` multiplies the losses of the tokens (None: all 1); `weight`, their sum, is what the loss is divided by.
    """

    packed: Packed
    source_M: Tensor
    targets_M: Tensor
    weight: float
    ids: Sequence[str]
    weights_M: Tensor | None = None

    def to(self, device: torch.device) -> SupervisedBatch:
        """The batch on `device`."""
        return SupervisedBatch(
            self.packed.to(device),
            self.source_M.to(device),
            self.targets_M.to(device),
            self.weight,
            self.ids,
            None if self.weights_M is None else self.weights_M.to(device),
        )

    def read(self) -> tuple[Tensor, Tensor | float]:
        """Packed positions whose hidden states the loss reads, and their shares of `weight`."""
        return self.source_M, 1.0 if self.weights_M is None else self.weights_M


class LanguageModeling(Objective):
    """Summed negative log-likelihood of the supervised tokens, in nats, each times its token's weight."""

    def __init__(self, role: Role) -> None:
        super().__init__()
        self.role = role

    def collate(self, rows: Sequence[Tokens]) -> SupervisedBatch:
        """Pack rows; a token is predicted from the position before it, never across rows."""
        packed = pack([row.ids for row in rows])
        mask = np.concatenate([np.concatenate([[False], row.mask[1:]]) for row in rows])
        targets = torch.from_numpy(np.flatnonzero(mask))
        weights, total = None, float(len(targets))
        if any(row.weights is not None for row in rows):
            every = [row.weights if row.weights is not None else [1.0] * len(row.ids) for row in rows]
            chosen = np.concatenate([np.asarray(one, dtype=np.float64) for one in every])[targets.numpy()]
            weights, total = torch.from_numpy(chosen).float(), float(chosen.sum())
        return SupervisedBatch(packed, targets - 1, packed.ids_1N[0, targets], total, [row.id for row in rows], weights)

    def forward(self, batch: SupervisedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss; no further numbers."""
        hidden_MD = packed_hidden(self.role.tree, batch.packed)[batch.source_M]
        logprobs_M = chosen_logprobs(self.role, hidden_MD, batch.targets_M)
        return -(logprobs_M if batch.weights_M is None else logprobs_M * batch.weights_M).sum(), {}


@dataclass
class PairBatch:
    """Packed preference pairs and the positions of both replies' last tokens."""

    packed: Packed
    chosen_P: Tensor
    rejected_P: Tensor
    margin_P: Tensor | None
    weight: float
    ids: Sequence[str]

    def to(self, device: torch.device) -> PairBatch:
        """The batch on `device`."""
        margin = None if self.margin_P is None else self.margin_P.to(device)
        return PairBatch(
            self.packed.to(device), self.chosen_P.to(device), self.rejected_P.to(device), margin, self.weight, self.ids
        )

    def read(self) -> tuple[Tensor, Tensor | float]:
        """Packed positions whose hidden states the loss reads, and their shares of `weight`."""
        return torch.cat([self.chosen_P, self.rejected_P]), 0.5


class Pairwise(Objective):
    """Summed Bradley-Terry loss over preference pairs, with counts of right orders and summed margins."""

    def __init__(self, role: Role, centering: float = 0.0) -> None:
        super().__init__()
        self.role = role
        self.centering = centering

    def collate(self, rows: Sequence[PairTokens]) -> PairBatch:
        """Pack prompts once, each followed by its two replies."""
        packed = pack_branches([row.prompt for row in rows], [(row.chosen, row.rejected) for row in rows])
        ends = np.cumsum([len(part) for row in rows for part in (row.prompt, row.chosen, row.rejected)]) - 1
        has_margin = any(row.margin is not None for row in rows)
        margin = torch.tensor([row.margin or 0.0 for row in rows]) if has_margin else None
        chosen, rejected = torch.from_numpy(ends[1::3]), torch.from_numpy(ends[2::3])
        return PairBatch(packed, chosen, rejected, margin, float(len(rows)), [row.id for row in rows])

    def forward(self, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss, number of rightly ordered pairs (a tie counts half), summed score differences."""
        hidden_ND, head = packed_hidden(self.role.tree, batch.packed), self.role.head
        assert head is not None, "a reward model has a head"
        chosen_P, rejected_P = head(hidden_ND[torch.cat([batch.chosen_P, batch.rejected_P])]).chunk(2)
        loss_P = bradley_terry(chosen_P, rejected_P, batch.margin_P, self.centering)
        gap_P = (chosen_P - rejected_P).detach()
        right = (gap_P > 0).float() + 0.5 * (gap_P == 0).float()
        return loss_P.sum(), {"accuracy": right.sum(), "margin": gap_P.sum()}
