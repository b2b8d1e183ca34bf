"""From a reward model's scores to the reward that PPO sees, in one fixed order.

Sources: "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031: normalisation, EOS penalty) and
MOSS-RLHF (arXiv 2307.04964: normalise and clip); the penalty is subtracted, as TRL's `missing_eos_penalty`
was. The KL penalty is per token and is added later by the stage. Why the order matters: clipping before
normalising would clip in the reward model's arbitrary units, and a penalty before clipping could vanish in
the clip, so that never ending would cost nothing. Cost: none.
"""

from __future__ import annotations

import math

import torch


def shape_rewards(
    scores_B: torch.Tensor,
    finished_B: torch.Tensor,
    mean: float,
    std: float,
    clip: float | None,
    missing_eos_penalty: float,
) -> torch.Tensor:
    """Shape scores [B] of whole replies into rewards [B] in fp32, in units of `std`; in this order:

    1. normalise: ``(score - mean) / std``, the reward model's own statistics from its checkpoint;
    2. clip to ``[-clip, +clip]`` (None: no clip);
    3. EOS penalty: subtract `missing_eos_penalty` where finished_B (bool [B]) is False, after the clip, so
       that it is always felt.

    ValueError when std or clip is not a positive number, or the shapes differ.
    """
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ValueError(f"reward normalisation needs a finite mean and a positive std, not {mean} and {std}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive or None, not {clip}")
    if scores_B.shape != finished_B.shape:
        shapes = f"{tuple(scores_B.shape)} and {tuple(finished_B.shape)}"
        raise ValueError(f"scores and finished differ in shape: {shapes}")
    reward_B = (scores_B.float() - mean) / std
    if clip is not None:
        reward_B = reward_B.clamp(-clip, clip)
    return torch.where(finished_B.bool(), reward_B, reward_B - missing_eos_penalty)
