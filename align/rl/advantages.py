"""How much better a token was than what stood before it promised: the estimators of `stages.ppo.advantage`.

    R_i = shaped R(x, y_i) - beta sum over t of (log pi_old - log q)     whole reward of reply i, KL penalty included
    gae            A_t = sum over l of (gamma lambda)^l (r_t+l + gamma v_t+l+1 - v_t+l), whitened; lambda may grow with
                   the reply's length l: 1 - 1 / (alpha l)               arXiv 1506.02438, eq. 16; 2504.05118, sec. 4.2
    rloo           A_t = R_i - mean over the group's other replies of R  arXiv 2402.14740, eq. 8
    grpo           A_t = (R_i - mean of the group) / deviation of it     arXiv 2402.03300, sec. 4.1.2
    reinforce_pp   A_t = sum over l of gamma^l r_t+l, less the group's mean R where a prompt has several replies,
                   whitened                                              arXiv 2501.03262, sec. 2

A group is the replies to one prompt. The last three need no critic. The KL penalty is part of the reward in all four
(detail 12 of `docs/ppo.md`); GRPO's paper puts another estimate of it into the loss. Symbols are those of
`align/rl/__init__.py`; G prompts, K replies of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from align.functional import generalized_advantages, masked_mean, whiten
from align.rl.experience import Advantages, Judged, RewardRule, Rewards
from align.rl.options import Estimator

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over processes; a group's replies are all of one process."""


def estimate(rewards: Rewards, judged: Judged, rule: RewardRule, reduce: Reduce) -> Advantages:
    """The advantage of every reply token, and what the critic, if there is one, is trained towards."""
    return ESTIMATORS[rule.estimator](rewards, judged, rule, reduce)


def gae(rewards: Rewards, judged: Judged, rule: RewardRule, reduce: Reduce) -> Advantages:
    """Advantages by the critic's values, whitened over the global batch, and returns."""
    lam: float | Tensor = rule.lam
    if rule.lam_length:
        lam = (1.0 - 1.0 / (rule.lam_length * judged.mask_BT.sum(1).to(judged.values_BT))).clamp_min(0.0)
    advantages_BT, returns_BT = generalized_advantages(
        rewards.rewards_BT, judged.values_BT, judged.mask_BT, rule.gamma, lam
    )
    return Advantages(whiten(advantages_BT, judged.mask_BT, reduce), returns_BT)


def rloo(rewards: Rewards, judged: Judged, rule: RewardRule, reduce: Reduce) -> Advantages:
    """Each reply against the mean of the others to its prompt."""
    whole_GK = _grouped(rewards, rule)
    others_GK = (whole_GK.sum(1, keepdim=True) - whole_GK) / (rule.group_size - 1)
    return _everywhere(whole_GK - others_GK, judged)


def grpo(rewards: Rewards, judged: Judged, rule: RewardRule, reduce: Reduce) -> Advantages:
    """Each reply against its prompt's mean, in deviations; replies that are all alike teach nothing."""
    whole_GK = _grouped(rewards, rule)
    centred_GK = whole_GK - whole_GK.mean(1, keepdim=True)
    return _everywhere(centred_GK / (whole_GK.std(1, keepdim=True) + 1e-4), judged)


def reinforce_pp(rewards: Rewards, judged: Judged, rule: RewardRule, reduce: Reduce) -> Advantages:
    """The reward that is still to come, whitened over the global batch."""
    zeros_BT = torch.zeros_like(rewards.rewards_BT)
    to_come_BT, _ = generalized_advantages(rewards.rewards_BT, zeros_BT, judged.mask_BT, rule.gamma, 1.0)
    if rule.group_size > 1:
        mean_B = _grouped(rewards, rule).mean(1).repeat_interleave(rule.group_size)
        to_come_BT = to_come_BT - mean_B[:, None]
    return Advantages(whiten(to_come_BT, judged.mask_BT, reduce), zeros_BT)


ESTIMATORS: dict[Estimator, Callable[[Rewards, Judged, RewardRule, Reduce], Advantages]] = {
    Estimator.gae: gae,
    Estimator.rloo: rloo,
    Estimator.grpo: grpo,
    Estimator.reinforce_pp: reinforce_pp,
}


def _grouped(rewards: Rewards, rule: RewardRule) -> Tensor:
    """The whole reward of every reply, one prompt in a row [G, K]."""
    return rewards.rewards_BT.sum(1).reshape(-1, rule.group_size)


def _everywhere(advantages_GK: Tensor, judged: Judged) -> Advantages:
    """A reply's advantage at each of its tokens."""
    advantages_BT = advantages_GK.reshape(-1, 1) * judged.mask_BT
    return Advantages(advantages_BT, torch.zeros_like(advantages_BT))


def weigh(advantages: Advantages, judged: Judged, cap: float) -> tuple[Advantages, dict[str, float]]:
    """Advantages of replies that another engine sampled, each times its token's truncated importance weight.

        w_t = min(cap, pi_old(y_t) / mu(y_t))      mu: what the token was drawn from

    "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", Yao et al. 2025; the same elsewhere:
    `vllm_importance_sampling_correction` of TRL. The clipped loss is linear in an advantage, so that weighing it weighs
    the token. What the critic is trained towards stays as it is.

    Returns:
        the advantages, and what is logged of the difference: its mean in nats a token, and of the weights.
    """
    off_BT = judged.logprobs_BT - judged.sampled_BT
    numbers = {"rollout/logprob_gap_mean": float(masked_mean(off_BT.abs(), judged.mask_BT))}
    if not cap:
        return advantages, numbers
    ratio_BT = off_BT.exp()
    numbers["rollout/weight_mean"] = float(masked_mean(ratio_BT.clamp_max(cap), judged.mask_BT))
    numbers["rollout/weight_cut"] = float(masked_mean((ratio_BT > cap).float(), judged.mask_BT))
    return replace(advantages, advantages_BT=advantages.advantages_BT * ratio_BT.clamp_max(cap)), numbers
