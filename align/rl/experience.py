"""From sampled replies to experience: log-probabilities, reward, KL penalty, advantages, and what to log about them.

Order of the reward, fixed: score at the reply's last token -> normalise -> clip -> missing-EOS penalty -> minus the KL
penalty of every token -> GAE -> whitening over the global batch (arXiv 2403.17031; `docs/ppo.md` lists all 32 details).

Shape suffixes: B replies, T tokens of the longest reply, M reply tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.functional import (
    entropy,
    explained_variance,
    generalized_advantages,
    kl_k1,
    kl_k3,
    masked_mean,
    token_logprobs,
    whiten,
)
from align.inference.generation import Reply
from align.inference.scoring import ResponseBatch, pack_responses
from align.rl.actor_critic import ExperienceRow
from align.roles import CHUNK_ELEMENTS, Role
from data_prep.core.errors import TrainingStopped
from reward.shaping import shape_rewards


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


@dataclass
class PPORoles:
    """The four roles of PPO."""

    policy: Role
    reference: Role
    reward: Role
    value: Role

    def all(self) -> list[Role]:
        return [self.policy, self.reference, self.reward, self.value]


@dataclass
class Experience:
    """Rows for the update, and the batch's statistics (means over this process's replies)."""

    rows: list[ExperienceRow]
    stats: dict[str, float]


@torch.no_grad()
def collect(
    roles: PPORoles,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Reply],
    rule: RewardRule,
    passes: Sequence[Sequence[int]],
    reduce: Callable[[Tensor], Tensor],
) -> Experience:
    """Score replies and turn them into experience.

    `passes` are the places of the rows that are computed at a time, in order; `reduce` sums a tensor over processes.
    """
    for role in roles.all():
        role.eval()
    pairs = [(prompt, reply.ids) for prompt, reply in zip(prompts, replies, strict=True)]
    lengths_B = torch.tensor([len(reply.ids) for reply in replies])
    mask_BT = torch.arange(int(lengths_B.max()))[None] < lengths_B[:, None]
    parts = [_pass(roles, [pairs[i] for i in places], rule.temperature) for places in passes]
    logprobs_BT, reference_BT, values_BT, entropy_BT = (
        _unpack(torch.cat([part[i] for part in parts]), mask_BT) for i in range(4)
    )
    score_B = torch.cat([part[4] for part in parts])
    if not bool(torch.isfinite(score_B).all() & torch.isfinite(values_BT).all() & torch.isfinite(logprobs_BT).all()):
        raise TrainingStopped("scores, values or log-probabilities are not finite", code="not_finite")
    finished_B = torch.tensor([reply.finished for reply in replies])
    shaped_B = shape_rewards(score_B, finished_B, rule.mean, rule.std, rule.clip, rule.missing_eos_penalty)
    kl_BT = kl_k1(logprobs_BT, reference_BT)
    rewards_BT = -rule.kl_coef * kl_BT
    rewards_BT[torch.arange(len(replies)), lengths_B - 1] += shaped_B
    advantages_BT, returns_BT = generalized_advantages(rewards_BT, values_BT, mask_BT, rule.gamma, rule.lam)
    whitened_BT = whiten(advantages_BT, mask_BT, reduce)
    rows = _rows(pairs, logprobs_BT, values_BT, whitened_BT, returns_BT)
    sampled_BT = _unpack(torch.tensor([x for reply in replies for x in reply.logprobs]), mask_BT)
    stats = {
        "objective/kl_k1": _per_reply(kl_BT, mask_BT),
        "objective/kl_k3": _per_reply(kl_k3(logprobs_BT, reference_BT), mask_BT),
        "objective/entropy": float(masked_mean(entropy_BT, mask_BT)),
        "objective/score": float(score_B.mean()),
        "objective/score_shaped": float(shaped_B.mean()),
        "objective/reward": float(shaped_B.mean()) - rule.kl_coef * _per_reply(kl_BT, mask_BT),
        "objective/kl_penalty": rule.kl_coef * _per_reply(kl_BT, mask_BT),
        "objective/kl_coef": rule.kl_coef,
        "value/explained_var": float(explained_variance(values_BT, returns_BT, mask_BT)),
        "value/mean": float(masked_mean(values_BT, mask_BT)),
        "response/len_mean": float(lengths_B.float().mean()),
        "response/len_p95": float(torch.quantile(lengths_B.float(), 0.95)),
        "response/eos_rate": float(finished_B.float().mean()),
        "response/repeat_rate": _repeat_rate(replies),
        "rollout/logprob_gap": float((sampled_BT - logprobs_BT).abs()[mask_BT].max()),
        "rollout/kl_max": float(kl_BT[mask_BT].abs().max()),
    }
    return Experience(rows, stats)


def _rows(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    logprobs: Tensor,
    values: Tensor,
    whitened: Tensor,
    returns: Tensor,
) -> list[ExperienceRow]:
    """One row per reply, with the numbers [B, T] of its own tokens."""
    rows = []
    for i, (prompt, reply) in enumerate(pairs):
        own = [x_BT[i, : len(reply)].tolist() for x_BT in (logprobs, values, whitened, returns)]
        rows.append(ExperienceRow(prompt, reply, own[0], own[1], own[2], own[3]))
    return rows


def _pass(roles: PPORoles, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float) -> list[Tensor]:
    """Policy and reference log-probabilities, values, entropies [M], and scores [B], on the CPU."""
    batch = pack_responses(pairs).to(roles.policy.tree.device)
    logprobs_M, entropy_M = _judged(roles.policy, batch, temperature)
    reference_M, _ = _judged(roles.reference, batch, temperature)
    values_M = roles.value.scores(batch.packed, batch.source_M)
    score_B = roles.reward.scores(batch.packed, batch.last_B)
    return [tensor.cpu() for tensor in (logprobs_M, reference_M, values_M, entropy_M, score_B)]


def _judged(role: Role, batch: ResponseBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [M] of the reply tokens; the logits of a chunk are held at a time."""
    hidden_MD = role.hidden(batch.packed)[batch.source_M]
    rows = max(1, CHUNK_ELEMENTS // role.tree.config.get_text_config().vocab_size)
    parts = []
    for start in range(0, hidden_MD.shape[0], rows):
        logits = role.logits(hidden_MD[start : start + rows])
        targets = batch.targets_M[start : start + rows]
        parts.append((token_logprobs(logits, targets, temperature), entropy(logits, temperature)))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


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
