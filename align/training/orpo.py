"""Odds-ratio preference optimisation: the loss of the stage `orpo`. No reference.

"ORPO: Monolithic Preference Optimization without Reference Model", arXiv 2403.07691, eq. 6 and 7. With l(y) the mean
log-probability of a reply's tokens, P = exp l and odds(y) = P / (1 - P):

    -l(c) - beta log s(log odds(c) - log odds(r))

beta is the paper's lambda. TRL's trainer, the oracle of the second term, takes the first one over the prompt's tokens
too and over all tokens of a batch at once; here it is the paper's: over the reply, by pair. Cost: one forward and
backward over prompt and both replies, the prompt once.

Shape suffixes: P pairs, R replies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.models.forward import packed_hidden
from align.roles import Role
from align.training.dpo import collate_pairs, pair_numbers
from align.training.objectives import Objective
from align.training.replies import ReplyBatch, reply_logprobs
from data_prep.types import PairTokens


def log_odds(mean_logprob: Tensor) -> Tensor:
    """log(P / (1 - P)) of P = exp(mean_logprob), exact near P = 0 and P = 1; finite where P rounds to 1."""
    mean_logprob = mean_logprob.clamp_max(-torch.finfo(mean_logprob.dtype).eps)
    return mean_logprob - torch.log(-torch.expm1(mean_logprob))


class OddsRatio(Objective):
    """Summed likelihood and odds-ratio loss over pairs."""

    def __init__(self, role: Role, beta: float = 0.1) -> None:
        super().__init__()
        self.role = role
        self.beta = beta

    def collate(self, rows: Sequence[PairTokens]) -> ReplyBatch:
        """Every prompt once, behind it the chosen and the rejected reply."""
        return collate_pairs(rows)

    def forward(self, batch: ReplyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss; its two parts, summed rewards (beta l) and their order."""
        hidden_MD = packed_hidden(self.role.tree, batch.packed)[batch.source_M]
        logprobs_R = reply_logprobs(self.role, hidden_MD, batch)
        mean_R = logprobs_R / batch.lengths_R
        odds_R = log_odds(mean_R)
        gap_P = odds_R[0::2] - odds_R[1::2]
        likelihood = -mean_R[0::2].sum()
        loss = likelihood - self.beta * logsigmoid(gap_P).sum()
        numbers = pair_numbers(self.beta * mean_R.detach(), logprobs_R.detach())
        return loss, {**numbers, "nll": likelihood.detach(), "log_odds_ratio": gap_P.detach().sum()}
