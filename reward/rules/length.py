"""Rule "length": the reply has about the wanted number of words.

Source: this project's. A reward model that likes long replies is held by it. Cost: a count.
"""

from __future__ import annotations

from data_prep.core.errors import UserError
from reward.rules import rules


@rules.register("length")
class Length:
    """Counts words.

    Args:
        target: the wanted number.

    Raises:
        UserError: target is below 1.
    """

    def __init__(self, target: int) -> None:
        if target < 1:
            raise UserError(f"a length of at least 1 is needed (got {target})", code="bad_value")
        self._target = target

    def score(self, prompt_text: str, topic: str, reply_text: str, finished: bool) -> dict[str, float]:
        """score: 1.0 at the target, falling evenly to 0.0 at no words and at twice as many."""
        return {"score": max(0.0, 1.0 - abs(len(reply_text.split()) - self._target) / self._target)}
