"""The Bradley-Terry loss of a reward model over preference pairs.

Sources: Bradley & Terry 1952; "Learning to summarize from human feedback" (arXiv 2009.01325); the margin is
that of Llama 2 (arXiv 2307.09288); the centering term that of "Helping or Herding?" (arXiv 2312.09244), in
TRL `center_rewards_coefficient`. It differs in one thing: one loss per pair is returned, so that the caller
averages over the global batch.
Cost: a few flops a pair.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def bradley_terry(
    chosen_B: torch.Tensor,
    rejected_B: torch.Tensor,
    margin_B: torch.Tensor | None = None,
    centering: float = 0.0,
) -> torch.Tensor:
    """Loss of each pair in nats: ``-log sigmoid(c - r - margin) + centering * (c + r)^2``.

    chosen_B, rejected_B: scores [B], any float dtype; margin_B: how far apart the two should be, in units of
    score, or None for 0; centering: weight of the pull of ``c + r`` towards 0. Returns [B], fp32, unaveraged.
    ValueError when the shapes differ (broadcasting would pair the wrong replies).
    """
    if chosen_B.shape != rejected_B.shape or (margin_B is not None and margin_B.shape != chosen_B.shape):
        shapes = f"{tuple(chosen_B.shape)} and {tuple(rejected_B.shape)}"
        raise ValueError(f"scores (and margins) of one shape needed, not {shapes}")
    chosen_B, rejected_B = chosen_B.float(), rejected_B.float()
    gap_B = chosen_B - rejected_B
    if margin_B is not None:
        gap_B = gap_B - margin_B.float()
    return -functional.logsigmoid(gap_B) + centering * (chosen_B + rejected_B).square()
