"""What a stage shows of itself before it runs: its roles and its largest passes, without a number in any weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.roles import Role
    from align.training.objectives import Objective


@dataclass(frozen=True)
class Rehearsal:
    """A stage's roles on the meta device, and the rows of the largest passes through them."""

    roles: Sequence[Role]
    """All that are in memory at a time; those inside the objective may be left out."""
    objective: Objective | None = None
    train: Sequence[Any] = ()
    """Rows of the largest pass with gradients, as `Objective.collate` takes them."""
    passes: int = 1
    """Passes of that optimiser step."""
    score: Sequence[Any] = ()
    """Rows of the largest pass without gradients, where there are larger ones than those of training."""
    reread: int = 0
    """Tokens of rows that come in several passes: what a trunk cache keeps something of."""
    answered: Sequence[int] = ()
    """Tokens of the prompts that are answered at a time."""
    new_tokens: int = 0
    """Longest reply to them."""
