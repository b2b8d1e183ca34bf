"""Rule "exact_answer": the reply is the row's right answer, word for word.

For tasks with one right answer, as in "DeepSeekMath", arXiv 2402.03300, section 4.2, which rewards reasoning by its
result. White space is folded on both sides. Cost: a comparison.
"""

from __future__ import annotations

from typing import ClassVar

from reward.rules import rules


@rules.register("exact_answer")
class ExactAnswer:
    """Compares a reply with the row's `ground_truth`.

    Args:
        after: both sides count from behind the last occurrence of this text alone ("####" in GSM8K); a side without it
            counts whole if it is the answer, and is wrong if it is the reply.
        case: whether upper and lower case differ.
    """

    reads_truth: ClassVar[bool] = True

    def __init__(self, after: str = "", case: bool = True) -> None:
        self._after, self._case = after, case

    def score(self, prompt_text: str, topic: str, reply_text: str, finished: bool, truth: str) -> dict[str, float]:
        """correct: it is the answer; finished: it ended; score: both. Every value is 0.0 or 1.0."""
        marked = self._after in reply_text
        correct = marked and self._normal(reply_text) == self._normal(truth)
        return {"score": float(correct and finished), "correct": float(correct), "finished": float(finished)}

    def _normal(self, text: str) -> str:
        if self._after:
            text = text.rpartition(self._after)[2]
        text = " ".join(text.split())
        return text if self._case else text.casefold()
