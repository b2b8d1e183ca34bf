"""Direct preference optimisation: the losses of preference pairs, and the objective of the stage `dpo`.

"Direct Preference Optimization: Your Language Model is Secretly a Reward Model", arXiv 2305.18290, eq. 7. With the log
ratio h(x, y) = log pi(y | x) - log q(y | x) of policy pi and frozen reference q, c and r the chosen and the rejected
reply, s the sigmoid and d = h(c) - h(r), a pair's loss is:

    sigmoid       -(1 - e) log s(beta d) - e log s(-beta d)       eq. 7; with label noise e known as conservative DPO
    hinge         max(0, 1 - beta d)                                                arXiv 2305.10425
    ipo           (h(c)/|c| - h(r)/|r| - 1/(2 beta))^2                              arXiv 2310.12036, eq. 17
    robust        (-(1 - e) log s(beta d) + e log s(-beta d)) / (1 - 2 e)           arXiv 2403.00409
    exo_pair      KL(softmax(beta h) || (1 - e, e))                                 arXiv 2402.00856, eq. 16
    nca_pair      -log s(beta h(c)) - (log s(-beta h(c)) + log s(-beta h(r))) / 2   arXiv 2402.05369
    bco_pair      -log s(beta h(c)) - log s(-beta h(r))                             arXiv 2404.04656
    sppo_hard     (h(c) - 1/(2 beta))^2 + (h(r) + 1/(2 beta))^2                     arXiv 2405.00675, eq. 4.7
    apo_zero      1 - s(beta h(c)) + s(beta h(r))                                   arXiv 2408.06266, eq. 7
    apo_down      s(beta h(c)) + 1 - s(beta d)                                      arXiv 2408.06266, eq. 8
    sigmoid_norm  -log s(beta (h(c)/|c| - h(r)/|r|))                                arXiv 2411.15124

Names and formulas are those of TRL's DPOTrainer, the oracle in tests. Cost: one forward and backward of the policy and
one forward of the reference over prompt and both replies, the prompt once.

Shape suffixes: P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.models.forward import packed_hidden
from align.roles import Role
from align.training.replies import Referenced, ReplyBatch, pack_replies, replies_under, reply_logprobs
from data_prep.types import PairTokens


@dataclass(frozen=True)
class Ratios:
    """Log ratios of policy over reference of both replies of P pairs, and the replies' tokens."""

    chosen_P: Tensor
    rejected_P: Tensor
    chosen_tokens_P: Tensor
    rejected_tokens_P: Tensor

    @property
    def gap_P(self) -> Tensor:
        """d, by how much more the policy has moved towards the chosen reply."""
        return self.chosen_P - self.rejected_P

    @property
    def gap_per_token_P(self) -> Tensor:
        """The same of log ratios by token."""
        return self.chosen_P / self.chosen_tokens_P - self.rejected_P / self.rejected_tokens_P


def sigmoid(h: Ratios, beta: float, noise: float) -> Tensor:
    """Negative log-likelihood under Bradley-Terry of labels that are wrong with probability `noise`."""
    return -(1 - noise) * logsigmoid(beta * h.gap_P) - noise * logsigmoid(-beta * h.gap_P)


def hinge(h: Ratios, beta: float, noise: float) -> Tensor:
    """Nothing beyond a margin of 1."""
    return torch.relu(1 - beta * h.gap_P)


def ipo(h: Ratios, beta: float, noise: float) -> Tensor:
    """Squared distance of the gap from 1/(2 beta), by token, as its authors compute it."""
    return (h.gap_per_token_P - 1 / (2 * beta)).square()


def robust(h: Ratios, beta: float, noise: float) -> Tensor:
    """An unbiased estimate of the loss without noise."""
    right, wrong = logsigmoid(beta * h.gap_P), logsigmoid(-beta * h.gap_P)
    return (noise * wrong - (1 - noise) * right) / (1 - 2 * noise)


def exo_pair(h: Ratios, beta: float, noise: float) -> Tensor:
    """Reverse KL from the policy's choice between both replies to the label's; `noise` is above 0."""
    right, wrong = logsigmoid(beta * h.gap_P), logsigmoid(-beta * h.gap_P)
    label = torch.tensor([1 - noise, noise], dtype=right.dtype, device=right.device).log()
    return right.exp() * (right - label[0]) + wrong.exp() * (wrong - label[1])


def nca_pair(h: Ratios, beta: float, noise: float) -> Tensor:
    """Noise-contrastive: the chosen reply above, and both below, where the reference has them."""
    chosen_P, rejected_P = beta * h.chosen_P, beta * h.rejected_P
    return -logsigmoid(chosen_P) - 0.5 * (logsigmoid(-chosen_P) + logsigmoid(-rejected_P))


def bco_pair(h: Ratios, beta: float, noise: float) -> Tensor:
    """A binary classifier of chosen and rejected replies."""
    return -logsigmoid(beta * h.chosen_P) - logsigmoid(-beta * h.rejected_P)


def sppo_hard(h: Ratios, beta: float, noise: float) -> Tensor:
    """Squared distances from the step of self-play towards a win and a loss."""
    return (h.chosen_P - 0.5 / beta).square() + (h.rejected_P + 0.5 / beta).square()


def apo_zero(h: Ratios, beta: float, noise: float) -> Tensor:
    """Chosen up, rejected down: where chosen replies are better than the model's own."""
    return 1 - torch.sigmoid(beta * h.chosen_P) + torch.sigmoid(beta * h.rejected_P)


def apo_down(h: Ratios, beta: float, noise: float) -> Tensor:
    """Both down, rejected more: where the model's own replies are better than both."""
    return torch.sigmoid(beta * h.chosen_P) + 1 - torch.sigmoid(beta * h.gap_P)


def sigmoid_norm(h: Ratios, beta: float, noise: float) -> Tensor:
    """`sigmoid` on log ratios by token."""
    return -logsigmoid(beta * h.gap_per_token_P)


LOSSES: dict[str, Callable[[Ratios, float, float], Tensor]] = {
    loss.__name__: loss
    for loss in (
        *(sigmoid, hinge, ipo, robust, exo_pair, nca_pair),
        *(bco_pair, sppo_hard, apo_zero, apo_down, sigmoid_norm),
    )
}
"""(log ratios, beta, label noise) -> the loss of each pair, [P], by the name of the option `loss_type`."""


class DirectPreference(Referenced):
    """Summed loss over pairs, and what policy and reference think of both replies."""

    def __init__(
        self, role: Role, reference: Role, loss_type: str = "sigmoid", beta: float = 0.1, label_smoothing: float = 0.0
    ) -> None:
        super().__init__(role, reference)
        self.loss = LOSSES[loss_type]
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.sft_weight = 0.0
        """Weight of the chosen reply's negative log-likelihood by token (arXiv 2404.19733)."""

    def collate(self, rows: Sequence[PairTokens]) -> ReplyBatch:
        """Every prompt once, behind it the chosen and the rejected reply."""
        return collate_pairs(rows)

    def forward(self, batch: ReplyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss; summed rewards, their order, and log-probabilities."""
        hidden_MD = packed_hidden(self.role.tree, batch.packed)[batch.source_M]
        logprobs_R = reply_logprobs(self.role, hidden_MD, batch)
        ratio_R = logprobs_R - replies_under(self.reference, batch)
        lengths_R = batch.lengths_R
        ratios = Ratios(ratio_R[0::2], ratio_R[1::2], lengths_R[0::2], lengths_R[1::2])
        loss = self.loss(ratios, self.beta, self.label_smoothing).sum()
        numbers = pair_numbers(self.beta * ratio_R.detach(), logprobs_R.detach())
        numbers["max_log_ratio"] = ratio_R.detach().abs().max()
        if self.sft_weight:
            likelihood = (-logprobs_R[0::2] / lengths_R[0::2]).sum()
            loss = loss + self.sft_weight * likelihood
            numbers["nll"] = likelihood.detach()
        return loss, numbers


def collate_pairs(rows: Sequence[PairTokens]) -> ReplyBatch:
    """Pairs as a batch whose replies are chosen, rejected, chosen, rejected, ..."""
    replies = [(row.chosen, row.rejected) for row in rows]
    return pack_replies([row.prompt for row in rows], replies, [row.id for row in rows])


def pair_numbers(rewards_R: Tensor, logprobs_R: Tensor) -> dict[str, Tensor]:
    """What is logged of pairs, summed over them, under the names that TRL has for it; a tie counts half."""
    margin_P = rewards_R[0::2] - rewards_R[1::2]
    return {
        "rewards/chosen": rewards_R[0::2].sum(),
        "rewards/rejected": rewards_R[1::2].sum(),
        "rewards/margins": margin_P.sum(),
        "rewards/accuracies": (margin_P > 0).float().sum() + 0.5 * (margin_P == 0).float().sum(),
        "logps/chosen": logprobs_R[0::2].sum(),
        "logps/rejected": logprobs_R[1::2].sum(),
    }
