"""Rule "number": the last number in the reply is the last number in the row's right answer.

The usual check of arithmetic word problems ("Training Verifiers to Solve Math Word Problems", arXiv 2110.14168). Cost:
two searches.
"""

from __future__ import annotations

import re
from typing import ClassVar

from data_prep.core.errors import UserError
from reward.rules import rules

_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?|-?\.\d+")


@rules.register("number")
class Number:
    """Compares the last numbers of reply and `ground_truth`; 1,234.50 and 1234.5 are one number.

    Args:
        tolerance: largest difference that counts as equal, as a share of the right number.
    """

    reads_truth: ClassVar[bool] = True

    def __init__(self, tolerance: float = 1e-9) -> None:
        self._tolerance = tolerance

    def score(self, prompt_text: str, topic: str, reply_text: str, finished: bool, truth: str) -> dict[str, float]:
        """number: there is one; score: it is the right one, in a reply that ended.

        Raises:
            UserError: the right answer has no number.
        """
        right, said = last_number(truth), last_number(reply_text)
        if right is None:
            raise UserError("the right answer has no number in it", field="ground_truth", code="no_number")
        correct = said is not None and abs(said - right) <= self._tolerance * max(1.0, abs(right))
        return {"score": float(correct and finished), "number": float(said is not None)}


def last_number(text: str) -> float | None:
    """The last number in a text."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
