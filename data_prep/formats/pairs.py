"""pairs: {"prompt", "chosen", "rejected"}, each as text or as message lists (TRL's explicit prompt); `margin` if known.

Message lists in `chosen` and `rejected` hold the reply alone, or repeat the prompt before it (UltraFeedback); a text
prompt is one user message.
"""

from __future__ import annotations

from typing import Any

from data_prep.formats.base import (
    FORMATS,
    PREFERENCE,
    PROMPT,
    Format,
    find_key,
    need_question,
    number_field,
    parse_messages,
    split_of,
    text_of,
)
from data_prep.sources import Row
from data_prep.types import Message, Preference, Prompt

_PROMPTS = ("prompt", "question")


@FORMATS.register("pairs")
class Pairs(Format):
    """A prompt and two replies."""

    kinds = (PREFERENCE, PROMPT)
    columns = (*_PROMPTS, "chosen", "rejected")

    @classmethod
    def detect(cls, keys: frozenset[str]) -> bool:
        """A prompt and both sides."""
        return {"chosen", "rejected"} <= keys and bool(keys & set(_PROMPTS))

    def preference(self, row: Row) -> Preference:
        """The prompt and both replies."""
        asked = self._asked(row)
        chosen = self._reply(row, "chosen", asked)
        rejected = self._reply(row, "rejected", asked)
        return Preference(asked, chosen, rejected, row.id, number_field(row, "margin"), split_of(row))

    def prompt(self, row: Row) -> Prompt:
        """The prompt alone."""
        return Prompt(self._asked(row), row.id, split_of(row))

    def _asked(self, row: Row) -> tuple[Message, ...]:
        field = find_key(row, _PROMPTS)
        value: Any = row.data[field]
        if isinstance(value, list):
            return need_question(row, field, parse_messages(row, field, value))
        return (Message("user", text_of(row, field, value)),)

    def _reply(self, row: Row, field: str, asked: tuple[Message, ...]) -> str:
        value: Any = row.data[find_key(row, (field,))]
        if not isinstance(value, list):
            return text_of(row, field, value)
        messages = parse_messages(row, field, value)
        if messages[-1].role != "assistant":
            raise row.problem(field, f"ends in a {messages[-1].role} turn (expected an assistant turn)")
        if len(messages) > 1 and messages[:-1] != asked:
            raise row.problem(field, "repeats another prompt than the column prompt (expected the same messages)")
        return messages[-1].content
