"""squad: {"context", "question", "answers": {"text": [...], "answer_start"}} (SQuAD, arXiv 1606.05250).

The context stands before the question, with a blank line; of several answers, which are alternatives, the first is the
reply, counted. Questions without an answer (SQuAD 2.0) are skipped and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from data_prep.core.errors import UserError
from data_prep.formats.base import FORMATS, Several, Spellings
from data_prep.formats.column_checks import find_key, object_of, text_of
from data_prep.formats.prompt_completion import PromptCompletion
from data_prep.sources.rows import Row, Skip
from data_prep.types import CONVERSATION, PROMPT, Conversation, Message


@FORMATS.register("squad")
class Squad(PromptCompletion):
    """A question about a text, and where its answer stands."""

    kinds = (CONVERSATION, PROMPT)
    spellings: ClassVar[Spellings] = (("question", "answers", "context"), ("question", "answers"))
    writes = ""

    @classmethod
    def doubt(cls, rows: Sequence[Mapping[str, Any]], kind: str, options: Mapping[str, Any]) -> UserError | None:
        """Answers of other shapes are another format's."""
        if any(isinstance(row.get("answers"), Mapping) and "text" in row["answers"] for row in rows):
            return None
        return UserError("answers hold no texts of answers", code="unknown_format")

    def conversation(self, row: Row) -> Several[Conversation]:  # type: ignore[override]
        """Context and question, and the first answer."""
        asked = self.prompt(row)
        answers = object_of(row, "answers", row.data[find_key(row, ("answers",))])
        texts = answers.get("text")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list):
            raise row.problem("answers.text", "wrong type (expected a list of texts)")
        if not texts:
            return Skip("no_answer")
        if len(set(texts)) > 1:
            self.notes["rows with several right answers, of which the first is the reply"] += 1
        reply = Message("assistant", text_of(row, "answers.text[0]", texts[0]))
        return Conversation((*asked.messages, reply), row.id, asked.meta)
