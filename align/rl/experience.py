"""From sampled replies to experience: log-probabilities, reward, KL penalty, and what to log about them.

Order of the reward, fixed: score at the reply's last token -> normalise -> clip -> missing-EOS penalty -> minus the KL
penalty of every token -> GAE -> whitening over the global batch (arXiv 2403.17031; `docs/ppo.md` lists all 32 details).

    r_t = -beta (log pi_old(y_t | s_t) - log q(y_t | s_t)) + [t last] shaped R(x, y)    arXiv 1909.08593, eq. 2

`align/rl/advantages.py` goes on from there. The same elsewhere: `get_rewards_ppo` of torchtune's `rlhf/rewards.py`.
Symbols are those of `align/rl/__init__.py`; shape suffixes: B replies, T tokens of the longest reply, M reply tokens of
all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from align.functional import (
    explained_variance,
    kl_k1,
    kl_k3,
    masked_mean,
)
from align.inference.generation import Reply
from align.inference.scoring import ResponseBatch, pack_responses
from align.models.trunk import has_trunk
from align.rl.actor_critic import ExperienceRow
from align.rl.options import Estimator
from align.rl.signals.weighed import Signals
from align.roles import Role, chosen_logprobs, chosen_statistics
from align.training.batching import in_order
from align.training.optimizer import autocast
from data_prep.core.errors import TrainingStopped
from reward.shaping import shape_rewards

if TYPE_CHECKING:
    from align.training.options import TrainingOptions
    from data_prep.types import PromptTokens


Pairs = Sequence[tuple[Sequence[int], Sequence[int]]]
"""(prompt, reply) as token ids."""
_CHECKED = 8  # one reply of so many, and so many at least, are read by the policy once more
GAP = 1e-3
"""Largest difference at which a rollout's log-probabilities count as those of training."""


@dataclass(frozen=True)
class RewardRule:
    """How scores and divergence become rewards."""

    kl_coef: float
    mean: float
    std: float
    clip: float
    missing_eos_penalty: float
    gamma: float
    lam: float
    temperature: float
    estimator: Estimator = Estimator.gae
    group_size: int = 1
    """Replies to each prompt, which stand next to each other."""
    lam_length: float = 0.0
    signals: Signals | None = None
    """What scores are made of, where that is more than the reward model."""


@dataclass
class PPORoles:
    """The roles of PPO, four at most."""

    policy: Role
    reference: Role
    reward: Role | None
    """None where rules alone give rewards."""
    value: Role | None
    """None where advantages need no critic."""
    ensemble: Sequence[Role] = ()
    """Further reward models, beside `reward`."""

    def judges(self) -> list[Role]:
        """The reward models that there are."""
        return [*([self.reward] if self.reward is not None else []), *self.ensemble]

    def all(self) -> list[Role]:
        """Those that there are."""
        return [self.policy, self.reference, *self.judges(), *([self.value] if self.value is not None else [])]

    def trained(self) -> dict[str, Role]:
        """Those that are trained, by name."""
        return {role.name: role for role in (self.policy, self.value) if role is not None}


@dataclass(frozen=True)
class Rollout:
    """The prompts of an update and the replies that the policy gave, in one order."""

    prompts: Sequence[PromptTokens]
    replies: Sequence[Reply]

    @property
    def pairs(self) -> list[tuple[list[int], list[int]]]:
        """(prompt, reply) as token ids."""
        return [(prompt.ids, reply.ids) for prompt, reply in zip(self.prompts, self.replies, strict=True)]


@dataclass(frozen=True)
class Judged:
    """What roles and signals say of a rollout, on the CPU; places outside the mask are 0."""

    mask_BT: Tensor
    """True on the tokens of the replies."""
    logprobs_BT: Tensor
    reference_BT: Tensor
    values_BT: Tensor
    entropy_BT: Tensor
    score_B: Tensor
    checked_BT: Tensor
    """True on the tokens of those replies whose entropy was measured."""
    sampled_BT: Tensor
    """The log-probabilities that the replies were drawn with, as whoever drew them says."""
    gap: float = 0.0
    """Largest difference between a log-probability that the rollout kept and the same computed again."""
    signals: dict[str, Tensor] = field(default_factory=dict)
    """What `score_B` was made of, [B] each; none where it is the reward model's."""


@dataclass(frozen=True)
class Rewards:
    """The reward of every token, and the two parts that it is made of."""

    rewards_BT: Tensor
    shaped_B: Tensor
    """The score after normalising, clip and end penalty, given at a reply's last token."""
    kl_BT: Tensor


@dataclass(frozen=True)
class Advantages:
    """What an estimator makes of the rewards; 0 outside the mask."""

    advantages_BT: Tensor
    returns_BT: Tensor
    """What the critic is trained towards; 0 without one."""


@torch.no_grad()
def judge(
    roles: PPORoles,
    rollout: Rollout,
    temperature: float,
    options: TrainingOptions,
    trusted: bool = False,
    signals: Signals | None = None,
) -> Judged:
    """Log-probabilities of policy and reference, values and scores, as many rows at a time as the options say.

    Every eighth reply, or eight where there are fewer than 64, is read by the policy once more: for its entropy, and
    to compare. Where the rollout is `trusted` all replies keep the log-probabilities that they were sampled with, which
    are the same numbers; if the comparison says otherwise, all are computed again.
    """
    for role in roles.all():
        role.eval()
    lengths_B = torch.tensor([len(reply) for _, reply in rollout.pairs])
    mask_BT = torch.arange(int(lengths_B.max()))[None] < lengths_B[:, None]
    stride = max(1, min(_CHECKED, len(lengths_B) // _CHECKED))
    checked_BT = mask_BT & (torch.arange(len(lengths_B)) % stride == 0)[:, None]
    sampled_BT = _unpack(torch.tensor([x for reply in rollout.replies for x in reply.logprobs]), mask_BT)
    logprobs_BT = sampled_BT

    def read(through: Callable[[Pairs], list[Tensor]], pairs: Pairs) -> list[Tensor]:
        sizes = [len(prompt) + len(reply) for prompt, reply in pairs]
        parts = [
            through([pairs[i] for i in places])
            for places in in_order(sizes, options.micro_batch_size, options.micro_tokens)
        ]
        return [torch.cat(found).cpu() for found in zip(*parts, strict=True)]

    with autocast(options, roles.policy.tree.device):
        again_M, entropy_M = read(partial(_measured, roles.policy, temperature), rollout.pairs[::stride])
        gap = float((again_M - logprobs_BT[checked_BT]).abs().max())
        if not (trusted and gap <= GAP):
            (again_M,) = read(partial(_logprobs, roles.policy, temperature), rollout.pairs)
            gap = float((again_M - logprobs_BT[mask_BT]).abs().max())
            logprobs_BT = _unpack(again_M, mask_BT)
        reference_M, values_M, models_BK = read(partial(_pass, roles, temperature), rollout.pairs)
    reference_BT, values_BT = _unpack(reference_M, mask_BT), _unpack(values_M, mask_BT)
    entropy_BT = _unpack(entropy_M, checked_BT)
    parts = signals.scores(rollout.prompts, rollout.replies, models_BK) if signals is not None else {}
    score_B = signals.total(parts) if signals is not None else models_BK[:, 0]
    judged = Judged(
        mask_BT, logprobs_BT, reference_BT, values_BT, entropy_BT, score_B, checked_BT, sampled_BT, gap, parts
    )
    for numbers in (judged.score_B, judged.values_BT, judged.logprobs_BT):
        if not torch.isfinite(numbers).all():
            raise TrainingStopped("scores, values or log-probabilities are not finite", code="not_finite")
    return judged


def reward(judged: Judged, rollout: Rollout, rule: RewardRule) -> Rewards:
    """r_t = -beta KL_t, and the shaped score on top at the last token of each reply."""
    finished_B = torch.tensor([reply.finished for reply in rollout.replies])
    shaped_B = shape_rewards(judged.score_B, finished_B, rule.mean, rule.std, rule.clip, rule.missing_eos_penalty)
    kl_BT = kl_k1(judged.logprobs_BT, judged.reference_BT)
    rewards_BT = -rule.kl_coef * kl_BT
    rewards_BT[torch.arange(len(shaped_B)), judged.mask_BT.sum(1) - 1] += shaped_B
    return Rewards(rewards_BT, shaped_B, kl_BT)


def experience(rollout: Rollout, judged: Judged, advantages: Advantages) -> list[ExperienceRow]:
    """One row per reply, with the numbers of its own tokens."""
    every = (judged.logprobs_BT, judged.values_BT, advantages.advantages_BT, advantages.returns_BT)
    rows = []
    for i, (prompt, reply) in enumerate(rollout.pairs):
        own = [x_BT[i, : len(reply)].tolist() for x_BT in every]
        rows.append(ExperienceRow(prompt, reply, own[0], own[1], own[2], own[3], rollout.prompts[i].id))
    return rows


def statistics(
    rollout: Rollout, judged: Judged, rewards: Rewards, advantages: Advantages | None, rule: RewardRule
) -> dict[str, float]:
    """What is logged of replies: means over this process's share. Of the critic only where there are advantages."""
    mask_BT, replies = judged.mask_BT, rollout.replies
    kl = _per_reply(rewards.kl_BT, mask_BT)
    length_B = mask_BT.sum(1).float()
    critic: dict[str, float] = {}
    if rule.estimator.has_critic and advantages is not None:
        critic["value/explained_var"] = float(explained_variance(judged.values_BT, advantages.returns_BT, mask_BT))
        critic["value/mean"] = float(masked_mean(judged.values_BT, mask_BT))
    return {
        "objective/kl_k1": kl,
        "objective/kl_k3": _per_reply(kl_k3(judged.logprobs_BT, judged.reference_BT), mask_BT),
        "objective/entropy": float(masked_mean(judged.entropy_BT, judged.checked_BT)),
        "objective/score": float(judged.score_B.mean()),
        **{f"signal/{name}": float(part_B.mean()) for name, part_B in judged.signals.items()},
        "objective/score_shaped": float(rewards.shaped_B.mean()),
        "objective/score_spread": float(rewards.shaped_B.std(unbiased=False)),
        "objective/reward": float(rewards.shaped_B.mean()) - rule.kl_coef * kl,
        "objective/kl_penalty": rule.kl_coef * kl,
        "objective/kl_coef": rule.kl_coef,
        **critic,
        "response/len_mean": float(length_B.mean()),
        "response/len_p95": float(torch.quantile(length_B, 0.95)),
        "response/eos_rate": float(torch.tensor([reply.finished for reply in replies]).float().mean()),
        "response/repeat_rate": _repeat_rate(replies),
        "rollout/logprob_gap": judged.gap,
        "rollout/kl_max": float(rewards.kl_BT[mask_BT].abs().max()),
    }


def _batch(policy: Role, pairs: Pairs) -> ResponseBatch:
    """Rows as all roles read them; a trunk cache knows them one by one."""
    return pack_responses(pairs, apart=has_trunk(policy.tree)).to(policy.tree.device)


def _pass(roles: PPORoles, temperature: float, pairs: Pairs) -> list[Tensor]:
    """The reference's log-probabilities, values [M], and scores [B, K] of the K reward models."""
    batch = _batch(roles.policy, pairs)
    hidden_MD = roles.reference.hidden(batch.packed)[batch.source_M]
    reference_M = chosen_logprobs(roles.reference, hidden_MD, batch.targets_M, temperature)
    if roles.value is None:
        values_M = torch.zeros_like(reference_M)
    else:
        values_M = roles.value.scores(batch.packed, batch.source_M)
    models = [role.scores(batch.packed, batch.last_B) for role in roles.judges()]
    return [reference_M, values_M, torch.stack(models, 1) if models else torch.zeros(len(pairs), 0)]


def _logprobs(policy: Role, temperature: float, pairs: Pairs) -> list[Tensor]:
    """The policy's log-probabilities [M] of the reply tokens, as training computes them."""
    batch = _batch(policy, pairs)
    hidden_MD = policy.hidden(batch.packed)[batch.source_M]
    return [chosen_logprobs(policy, hidden_MD, batch.targets_M, temperature)]


def _measured(policy: Role, temperature: float, pairs: Pairs) -> list[Tensor]:
    """The same, and the entropies [M] of the distributions that the tokens were drawn from."""
    batch = _batch(policy, pairs)
    hidden_MD = policy.hidden(batch.packed)[batch.source_M]
    return list(chosen_statistics(policy, hidden_MD, batch.targets_M, temperature))


def _unpack(values_M: Tensor, mask_BT: Tensor) -> Tensor:
    """Lay per-token values out as [B, T]; places outside the mask are 0."""
    out_BT = torch.zeros(mask_BT.shape, dtype=torch.float32)
    out_BT[mask_BT] = values_M.float()
    return out_BT


def _per_reply(values_BT: Tensor, mask_BT: Tensor) -> float:
    """Mean over replies of the sum over their tokens."""
    return float(torch.where(mask_BT, values_BT, torch.zeros_like(values_BT)).sum(1).mean())


def _repeat_rate(replies: Sequence[Reply]) -> float:
    """Share of reply tokens that repeat the token before them."""
    repeats = sum(a == b for reply in replies for a, b in zip(reply.ids, reply.ids[1:], strict=False))
    return repeats / max(1, sum(len(reply.ids) for reply in replies))
