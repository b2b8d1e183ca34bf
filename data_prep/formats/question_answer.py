"""question_answer: {"question", "answer"} (GSM8K), also with `response` or `solution`, or {"problem", "solution"}.

`system` or `system_prompt` is read when present. A `context` (passage, article, ...) stands before the question, as
SQuAD is read. Of `solution` and `answer` in one row the longer is the reply: the other is what it comes to.
"""

from __future__ import annotations

from data_prep.formats.base import FORMATS
from data_prep.formats.prompt_completion import PromptCompletion
from data_prep.sources.rows import Row

_BOTH = ("solution", "answer")


@FORMATS.register("question_answer")
class QuestionAnswer(PromptCompletion):
    """A question and its answer."""

    spellings = (
        ("question", "answer"),
        ("Question", "Answer"),
        ("question", "response"),
        ("question", "solution"),
        ("problem", "solution"),
        ("prompt", "answer"),
        ("problem", "answer"),
    )
    extras = (*PromptCompletion.extras, *_BOTH)

    def _columns(self, row: Row) -> tuple[str, str]:
        """The columns of question and answer; of a solution and an answer the longer, counted."""
        left, right = super()._columns(row)
        both = [name for name in _BOTH if row.data.get(name) not in (None, "")]
        if right in both and len(both) == len(_BOTH):
            right = max(both, key=lambda name: len(str(row.data[name])))
            self.notes[f"replies taken from {right}, the longer of {' and '.join(_BOTH)}"] += 1
        return left, right
