"""question_answer: {"question", "answer"} (GSM8K), also with `response` or `solution`, or {"problem", "solution"}.

`system` or `system_prompt` is read when present.
"""

from __future__ import annotations

from data_prep.formats.base import FORMATS
from data_prep.formats.prompt_completion import PromptCompletion


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
    )
