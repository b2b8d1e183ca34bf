"""Rule "forbidden": the reply has none of the texts that are not wanted.

Source: this project's. Cost: a search for each text.
"""

from __future__ import annotations

from data_prep.core.errors import UserError
from reward.rules import rules


@rules.register("forbidden")
class Forbidden:
    """Looks for texts, wherever they stand.

    Args:
        texts: what must not occur.
        case: whether upper and lower case differ.

    Raises:
        UserError: there is no text, or an empty one, which would occur everywhere.
    """

    def __init__(self, texts: list[str], case: bool = False) -> None:
        if not texts or not all(texts):
            raise UserError("at least one text is needed, and none may be empty", code="bad_value")
        self._case = case
        self._texts = [self._normal(text) for text in texts]

    def score(self, prompt_text: str, topic: str, reply_text: str, finished: bool) -> dict[str, float]:
        """score: 1.0 where none of the texts occurs, else 0.0."""
        said = self._normal(reply_text)
        return {"score": float(not any(text in said for text in self._texts))}

    def _normal(self, text: str) -> str:
        return text if self._case else text.casefold()
