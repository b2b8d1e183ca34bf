"""What PPO minimises on a minibatch of experience: policy and value in one module, one backward.

    policy   max(-A_t rho_t, -A_t clamp(rho_t, 1 - clip, 1 + clip))                       arXiv 1707.06347, eq. 7
    value    max((v_t - G_t)^2, (v_old + clamp(v_t - v_old, -c, c) - G_t)^2) / 2          arXiv 2005.12729, A.1
    loss     policy + value_coef value                                                    arXiv 1707.06347, eq. 9

rho_t is pi over pi_old at the sampling temperature, c is `value_clip`. Losses are means over the response
tokens of the whole minibatch (arXiv 2403.17031), so they do not depend on how it is cut into micro-batches or spread
over processes. The same elsewhere: `PPOLoss` of torchtune's `rlhf/loss/ppo.py`. Symbols are those of
`align/rl/__init__.py`; shape suffixes: M response tokens of all rows, N packed tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from align.functional import kl_k3, policy_loss, value_loss
from align.inference.scoring import ResponseBatch, pack_responses
from align.models.forward import packed_hidden
from align.roles import Role, chosen_logprobs
from align.training.objectives import Objective


@dataclass
class ExperienceRow:
    """One rollout with everything the losses need; the lists run over the reply's tokens."""

    prompt: Sequence[int]
    reply: Sequence[int]
    logprobs: Sequence[float]
    values: Sequence[float]
    advantages: Sequence[float]
    returns: Sequence[float]
    id: str = ""


class ActorCritic(Objective):
    """Policy and value roles under one PPO loss."""

    def __init__(self, policy: Role, value: Role, clip: float, value_clip: float, value_coef: float) -> None:
        super().__init__()
        self.policy = policy
        self.value = value
        self.clip = clip
        self.value_clip = value_clip
        self.value_coef = value_coef
        self.temperature = 1.0
        self.dual_clip = 0.0
        self.policy_weight = 1.0
        """0 while only the critic is trained (warm-up); the graph stays the same."""

    def collate(self, rows: Sequence[ExperienceRow]) -> ResponseBatch:
        """Pack experience rows; per-token numbers are laid out as the reply tokens are."""
        batch = pack_responses([(row.prompt, row.reply) for row in rows], [row.id for row in rows])
        for name in ("logprobs", "values", "advantages", "returns"):
            batch.numbers[name] = torch.tensor([x for row in rows for x in getattr(row, name)], dtype=torch.float32)
        return batch

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Policy and value gradients are clipped apart."""
        return [[p for p in role.parameters() if p.requires_grad] for role in (self.policy, self.value)]

    def forward(self, batch: ResponseBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss and summed numbers over the minibatch's response tokens."""
        old_M, advantages_M = batch.numbers["logprobs"], batch.numbers["advantages"]
        hidden_MD = packed_hidden(self.policy.tree, batch.packed)[batch.source_M]
        logprobs_M = chosen_logprobs(self.policy, hidden_MD, batch.targets_M, self.temperature)
        policy_M, ratio_M, clipped_M = policy_loss(logprobs_M, old_M, advantages_M, self.clip, self.dual_clip)
        assert self.value.head is not None, "a critic has a head"
        values_M = self.value.head(packed_hidden(self.value.tree, batch.packed)[batch.source_M])
        value_M, value_clipped_M = value_loss(
            values_M, batch.numbers["values"], batch.numbers["returns"], self.value_clip
        )
        loss = self.policy_weight * policy_M.sum() + self.value_coef * value_M.sum()
        with torch.no_grad():
            numbers = {
                "policy/loss": policy_M.sum(),
                "policy/clipfrac": clipped_M.float().sum(),
                "policy/approxkl": kl_k3(old_M, logprobs_M).sum(),
                "policy/ratio_mean": ratio_M.sum(),
                "max_ratio_dev": (ratio_M - 1.0).abs().max(),
                "value/loss": value_M.sum(),
                "value/clipfrac": value_clipped_M.float().sum(),
            }
        return loss, numbers
