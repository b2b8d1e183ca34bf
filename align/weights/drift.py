"""How far two models are apart on the same text: what merging or truncating changed, measured.

Shape suffixes: N tokens of all texts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from align.models.packing import pack
from align.roles import Role


@dataclass(frozen=True)
class Drift:
    """Differences over every position of the probe."""

    max_logit: float
    """Largest absolute difference of two logits."""
    kl: float
    """Mean KL divergence from the first model's next-token distribution to the second's, nats per token."""
    argmax_agreement: float
    """Share of positions where both prefer the same token."""
    tokens: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"max logit difference {self.max_logit:.2e}, KL {self.kl:.2e} nats per token, "
            f"argmax agreement {self.argmax_agreement:.2%} on {self.tokens} tokens"
        )


Logits = Callable[[list[int]], Tensor]
"""Token ids of one text -> next-token logits of every position, [T, V]."""


@torch.no_grad()
def measure(before: Logits, after: Logits, rows: Sequence[list[int]]) -> Drift:
    """Compare two models position by position, in float64."""
    largest, divergence, agreeing, tokens = 0.0, 0.0, 0, 0
    for row in rows:
        first, second = before(row).double().cpu(), after(row).double().cpu()
        largest = max(largest, float((first - second).abs().max()))
        p, q = first.log_softmax(-1), second.log_softmax(-1)
        divergence += float((p.exp() * (p - q)).sum())
        agreeing += int((first.argmax(-1) == second.argmax(-1)).sum())
        tokens += len(row)
    return Drift(largest, divergence / tokens, agreeing / tokens, tokens)


def of_role(role: Role) -> Logits:
    """Logits of a role of this project."""

    def logits(row: list[int]) -> Tensor:
        return role.logits(role.hidden(pack([row]).to(role.tree.device)))

    return logits


def of_model(model: PreTrainedModel) -> Logits:
    """Logits of a stock transformers (or peft) model; those of virtual tokens, which come first, are left out."""

    def logits(row: list[int]) -> Tensor:
        found = model(input_ids=torch.tensor([row], device=model.device), use_cache=False)
        return found.logits[0, -len(row) :]  # type: ignore[no-any-return]

    return logits
