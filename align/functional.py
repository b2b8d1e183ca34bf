"""Pure tensor maths of alignment. No modules, no state, nothing that reads a configuration.

Shape suffixes: B sequences, T tokens of a response, N tokens packed in a row, V vocabulary, P pairs.
Masks are boolean; what a mask leaves out never influences a result, not even as NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def token_logprobs(logits_NV: Tensor, targets_N: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each target under softmax(logits / temperature), in float32. Returns [N]."""
    logits_NV = logits_NV.float()
    if temperature != 1.0:
        logits_NV = logits_NV / temperature
    return -F.cross_entropy(logits_NV, targets_N, reduction="none")


def entropy(logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature), float32. Returns [N]."""
    logprobs_NV = torch.log_softmax(logits_NV.float() / temperature, dim=-1)
    return -(logprobs_NV.exp() * logprobs_NV).sum(-1)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum where `mask`; masked values are replaced, not multiplied, so NaN outside the mask is harmless."""
    return torch.where(mask, values, torch.zeros_like(values)).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean where `mask`; the mask must select at least one value."""
    return masked_sum(values, mask) / mask.sum()


def whiten(values: Tensor, mask: Tensor, reduce: Callable[[Tensor], Tensor] = lambda total: total) -> Tensor:
    """Shift and scale the masked values to zero mean and unit variance; masked-out places become 0.

    `reduce` sums a tensor over processes, so that the statistics are those of the global batch. Source: detail 19 of
    "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031), which whitens each process's share alone.
    """
    count = reduce(mask.sum())
    mean = reduce(masked_sum(values, mask)) / count
    variance = reduce(masked_sum((values - mean).square(), mask)) / count
    scaled = (values - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, scaled, torch.zeros_like(scaled))


def kl_k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Per-token KL(policy, reference) estimate log p - log q of samples from p: unbiased, may be negative."""
    return logprobs - reference


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Per-token KL estimate (q/p - 1) - log(q/p): unbiased, never negative (Schulman, "Approximating KL")."""
    log_ratio = reference - logprobs
    return torch.expm1(log_ratio) - log_ratio


def generalized_advantages(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Advantages and returns by GAE (arXiv 1506.02438, eq. 16) over responses that start at column 0.

    `values_BT[:, t]` is the value before token t is chosen; the value after a response's last token is 0.
    `mask_BT` is true on a prefix of every row. `lam` may be one for each row [B]. Returns (advantages, returns), both 0
    outside the mask.
    """
    zeros = torch.zeros_like(values_BT)
    rewards_BT = torch.where(mask_BT, rewards_BT, zeros)
    values_BT = torch.where(mask_BT, values_BT, zeros)
    advantages_BT = torch.zeros_like(values_BT)
    running_B = torch.zeros_like(values_BT[:, 0])
    for t in reversed(range(values_BT.shape[1])):
        next_value_B = values_BT[:, t + 1] if t + 1 < values_BT.shape[1] else torch.zeros_like(running_B)
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        running_B = torch.where(mask_BT[:, t], delta_B + gamma * lam * running_B, torch.zeros_like(running_B))
        advantages_BT[:, t] = running_B
    return advantages_BT, torch.where(mask_BT, advantages_BT + values_BT, zeros)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip: float,
    dual_clip: float = 0.0,
    clip_high: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped surrogate of PPO (arXiv 1707.06347, eq. 7), per token, to be minimised.

    Returns (loss, ratio, clipped) of the inputs' shape; the log ratio is clamped to +-20 against overflow.
    `clip_high` above 0 is the clip of ratios above 1 (arXiv 2503.14476, eq. 10); 0: they are clipped as those below.
    `dual_clip` > 1 bounds the loss of negative advantages (arXiv 1912.09729, eq. 5); 0 turns it off.
    """
    ratio = torch.exp((logprobs - old_logprobs).clamp(-20.0, 20.0))
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip, 1.0 + (clip_high or clip))
    loss = torch.maximum(unclipped, clipped)
    if dual_clip > 1.0:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return loss, ratio, clipped > unclipped


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Half the squared error with clipped change of the value (arXiv 2005.12729, A.1), per token.

    Returns (loss, clipped). `clip` <= 0 turns the clipping off.
    """
    error = (values - returns).square()
    if clip <= 0:
        return 0.5 * error, torch.zeros_like(error, dtype=torch.bool)
    bounded = old_values + (values - old_values).clamp(-clip, clip)
    bounded_error = (bounded - returns).square()
    return 0.5 * torch.maximum(error, bounded_error), bounded_error > error


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the mask: 1 is a perfect critic, 0 a constant one."""
    error = torch.where(mask, returns - values, torch.zeros_like(values))
    centred_error = error - masked_mean(error, mask)
    centred_returns = returns - masked_mean(returns, mask)
    return 1.0 - masked_sum(centred_error.square(), mask) / masked_sum(centred_returns.square(), mask).clamp_min(1e-12)
