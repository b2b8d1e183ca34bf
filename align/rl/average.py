"""A moving average of the policy's trained weights: what held-out prompts are answered with, and what is handed over.

    e_k = d e_(k-1) + (1 - d) w_k        w_k: the policy's weights after update k, e_0 = w_0; d is `ema_decay`

The policy that samples replies and is trained is w. The same elsewhere: `--enable_ema` of DeepSpeed-Chat (arXiv
2308.01320, section 3), which averages over updates as well. Costs one float32 copy of the trained tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from align.models.sharding import part_like

if TYPE_CHECKING:
    from align.training.optimizer import Updater


class Average:
    """The average e of the policy that an updater trains.

    Args:
        decay: share of the average that an update leaves as it is.
    """

    def __init__(self, updater: Updater, decay: float) -> None:
        self._updater = updater
        self._decay = decay
        self.tensors = {name: p.float().clone() for name, p in self._policy().items()}
        """By name, in float32; an update makes new ones."""

    def take(self) -> None:
        """Take the weights after an update in."""
        own = self._policy()
        self.tensors = {name: e.lerp(own[name].float(), 1.0 - self._decay) for name, e in self.tensors.items()}

    def held(self) -> dict[str, Tensor]:
        """Every tensor that steps change, as `Updater.held`, the policy's averaged."""
        return self._updater.held() | self.tensors

    def put_back(self, tensors: dict[str, Tensor]) -> None:
        """As `Updater.put_back`."""
        self._updater.put_back(tensors)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Context in which the policy has its averaged weights."""
        own = self._updater.weights()
        self.put_back(self.held())
        try:
            yield
        finally:
            self.put_back(own)

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up what an earlier run kept of `tensors`."""
        for name, own in self.tensors.items():
            own.copy_(part_like([tensors[name]], own))

    def _policy(self) -> dict[str, Tensor]:
        return {name: p for name, p in self._updater.held().items() if name.startswith("policy.")}
