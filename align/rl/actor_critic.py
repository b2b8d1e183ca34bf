"""What PPO minimises on a minibatch of experience: policy and value in one module, one backward.

    policy   max(-A_t rho_t, -A_t clamp(rho_t, 1 - clip, 1 + clip_high))                  arXiv 1707.06347, eq. 7
    value    max((v_t - G_t)^2, (v_old + clamp(v_t - v_old, -c, c) - G_t)^2) / 2          arXiv 2005.12729, A.1
    loss     policy + value_coef value                                                    arXiv 1707.06347, eq. 9

rho_t is pi over pi_old at the sampling temperature, c is `value_clip`, and clip_high is clip unless set (arXiv
2503.14476, eq. 10). Losses are means over the response tokens of the whole minibatch (arXiv 2403.17031), so they do not
depend on how it is cut into micro-batches or spread over processes. The same elsewhere: `PPOLoss` of torchtune's
`rlhf/loss/ppo.py`. Symbols are those of `align/rl/__init__.py`; shape suffixes: M response tokens of all rows, N packed
tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from align.functional import kl_k3, policy_loss, value_loss
from align.inference.scoring import ResponseBatch, pack_responses
from align.models.forward import packed_hidden
from align.models.trunk import has_trunk
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


@dataclass(frozen=True)
class PPOLoss:
    """What is fixed of the loss for a whole stage."""

    clip: float = 0.2
    clip_high: float = 0.0
    """Clip of ratios above 1; 0: `clip`."""
    dual_clip: float = 0.0
    value_clip: float = 0.2
    value_coef: float = 1.0
    temperature: float = 1.0
    """Of the sampling, and so of the ratio's log-probabilities."""


class ActorCritic(Objective):
    """Policy and value roles under one PPO loss; without a value role the policy alone."""

    def __init__(self, policy: Role, value: Role | None, loss: PPOLoss) -> None:
        super().__init__()
        self.policy = policy
        self.value = value
        self.loss = loss
        self.warming = False
        """Whether only the critic learns: the policy is not computed, and the value's change is not clipped."""

    def collate(self, rows: Sequence[ExperienceRow]) -> ResponseBatch:
        """Pack experience rows, replies to one prompt behind it; per-token numbers are laid out as their tokens are."""
        pairs, apart = [(row.prompt, row.reply) for row in rows], has_trunk(self.policy.tree)
        batch = pack_responses(pairs, [row.id for row in rows], apart)
        for name in ("logprobs", "values", "advantages", "returns"):
            batch.numbers[name] = torch.tensor([x for row in rows for x in getattr(row, name)], dtype=torch.float32)
        return batch

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Policy and value gradients are clipped apart."""
        roles = [role for role in (self.policy, self.value) if role is not None]
        return [[p for p in role.parameters() if p.requires_grad] for role in roles]

    def forward(self, batch: ResponseBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss and summed numbers over the minibatch's response tokens."""
        if self.warming:
            loss, numbers = self._resting(batch)
        else:
            loss, numbers = self._policy(packed_hidden(self.policy.tree, batch.packed)[batch.source_M], batch)
        if self.value is not None:
            value_M, value_numbers = self._value(packed_hidden(self.value.tree, batch.packed)[batch.source_M], batch)
            loss = loss + self.loss.value_coef * value_M
            numbers |= value_numbers
        return loss, numbers

    def _policy(self, hidden_MD: Tensor, batch: ResponseBatch) -> tuple[Tensor, dict[str, Tensor]]:
        old_M, advantages_M = batch.numbers["logprobs"], batch.numbers["advantages"]
        logprobs_M = chosen_logprobs(self.policy, hidden_MD, batch.targets_M, self.loss.temperature)
        bounds = (self.loss.clip, self.loss.dual_clip, self.loss.clip_high)
        policy_M, ratio_M, clipped_M = policy_loss(logprobs_M, old_M, advantages_M, *bounds)
        with torch.no_grad():
            off_M = (ratio_M - 1.0).abs()
            numbers = {
                "policy/loss": policy_M.sum(),
                "policy/clipfrac": clipped_M.float().sum(),
                "policy/approxkl": kl_k3(old_M, logprobs_M).sum(),
                "policy/ratio_mean": ratio_M.sum(),
                "ratio_dev_mean": off_M.sum(),
                "max_ratio_dev": off_M.max(),
            }
        return policy_M.sum(), numbers

    def _resting(self, batch: ResponseBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """A loss of 0 that every parameter of the policy has a part in, as processes that add gradients expect.

        The policy is what it was in the rollout: every ratio is 1. Weights that are cut rest without gradients.
        """
        zero = torch.zeros((), device=self.policy.tree.device)
        whole = (p for p in self.policy.parameters() if p.requires_grad and not isinstance(p, DTensor))
        loss = sum((p.sum() * 0.0 for p in whole), zero)
        numbers = {"policy/clipfrac": zero, "policy/approxkl": zero, "policy/ratio_mean": zero + len(batch.targets_M)}
        return loss, numbers

    def _value(self, hidden_MD: Tensor, batch: ResponseBatch) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.value is not None and self.value.head is not None, "a critic has a head"
        values_M = self.value.head(hidden_MD)
        clip = 0.0 if self.warming else self.loss.value_clip
        value_M, clipped_M = value_loss(values_M, batch.numbers["values"], batch.numbers["returns"], clip)
        return value_M.sum(), {"value/loss": value_M.detach().sum(), "value/clipfrac": clipped_M.float().sum()}
