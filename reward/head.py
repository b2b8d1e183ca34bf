"""The scalar head: one number per hidden state, for reward and value models.

Source: "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031): the head starts from
N(0, 1/sqrt(D+1)) with zero bias, so that the first scores have about unit variance on unit-variance features.
Here the head always computes in fp32, also under autocast and on bf16 trunks: scores are compared at small
differences and a bf16 score has only 8 bits of them. Cost: D + 1 parameters.

Shape suffixes: B batch, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import nn


class ScalarHead(nn.Module):
    """Linear(D, 1) with bias, fp32, beside the trunk (never inside an adapter file, where it would be lost).

    State-dict keys: ``score.weight`` [1, D] and ``score.bias`` [1].
    """

    def __init__(self, width: int) -> None:
        """Make a head for hidden states of `width` features; draws from torch's global generator."""
        super().__init__()
        self.score = nn.Linear(width, 1, bias=True, dtype=torch.float32)
        nn.init.normal_(self.score.weight, mean=0.0, std=(width + 1) ** -0.5)
        nn.init.zeros_(self.score.bias)

    def zero(self) -> None:
        """Start anew: every score is 0."""
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Score hidden states [..., D] of any float dtype; returns [...] in fp32."""
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            weight, bias = self.score.weight.float(), self.score.bias.float()
            return nn.functional.linear(hidden.float(), weight, bias).squeeze(-1)
