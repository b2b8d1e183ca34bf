"""Rule "repetition": the reply does not say the same again.

The share of different n-grams, as distinct-n of "A Diversity-Promoting Objective Function for Neural Conversation
Models", arXiv 1510.03055, section 5.3, but of words within one reply. Cost: a count.
"""

from __future__ import annotations

from data_prep.core.errors import UserError
from reward.rules import rules


@rules.register("repetition")
class Repetition:
    """Counts runs of words that occur once more.

    Args:
        words: length of a run.

    Raises:
        UserError: words is below 1.
    """

    def __init__(self, words: int = 3) -> None:
        if words < 1:
            raise UserError(f"runs of at least 1 word are needed (got {words})", code="bad_value")
        self._words = words

    def score(self, prompt_text: str, topic: str, reply_text: str, finished: bool) -> dict[str, float]:
        """score: different runs over all runs; 1.0 where the reply is too short to have one."""
        said = reply_text.split()
        runs = [tuple(said[i : i + self._words]) for i in range(len(said) - self._words + 1)]
        return {"score": len(set(runs)) / len(runs) if runs else 1.0}
