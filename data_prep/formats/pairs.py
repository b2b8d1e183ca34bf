"""pairs: {"prompt", "chosen", "rejected"}, each as text or as message lists (TRL's explicit prompt); `margin` if known.

The prompt may also be called question, query, input or instruction (with `input`); `system` is read when present.
Message lists in `chosen` and `rejected` hold the reply alone, or repeat the prompt before it (UltraFeedback).
"""

from __future__ import annotations

from typing import Any, ClassVar

from data_prep.formats.alpaca import SYSTEM
from data_prep.formats.base import FORMATS, Spellings, pair
from data_prep.formats.chat_format import ChatFormat
from data_prep.formats.column_checks import find_key, meta_of, number_field
from data_prep.formats.message_lists import TOOLS, asked_columns, more_columns
from data_prep.formats.turns import reply_of
from data_prep.sources.rows import Row
from data_prep.types import PREFERENCE, PROMPT, Message, Preference, Prompt


@FORMATS.register("pairs")
class Pairs(ChatFormat):
    """A prompt and two replies."""

    kinds = (PREFERENCE, PROMPT)
    prompts_are: ClassVar[tuple[str, ...]] = ("prompt", "question", "instruction", "query", "input")
    sides: ClassVar[tuple[str, str]] = ("chosen", "rejected")
    writes: ClassVar[str] = PREFERENCE
    spellings: ClassVar[Spellings] = (
        ("prompt", "chosen", "rejected"),
        ("question", "chosen", "rejected"),
        ("instruction", "chosen", "rejected"),
        ("query", "chosen", "rejected"),
        ("input", "chosen", "rejected"),
    )
    extras: ClassVar[tuple[str, ...]] = ("input", "margin", "history", *TOOLS, *SYSTEM)
    takes_context: ClassVar[bool] = True

    def preference(self, row: Row) -> Preference:
        """The prompt and both replies."""
        asked, tools = self.asked_of(row, find_key(row, self.prompts_are))
        (prompt, chosen), (other, rejected) = (self._reply(row, field, asked) for field in self.sides)
        if prompt != other:
            raise row.problem(
                self.sides[1],
                f"answers another prompt than {self.sides[0]} (got another; expected the same)",
                "other_prompt",
            )
        more: dict[str, Any] = {"margin": number_field(row, "margin"), "meta": meta_of(row), "tools": tools}
        return pair(row, prompt, chosen, rejected, **more)

    def written(self, record: Any) -> dict[str, Any]:
        """The prompt, both replies as text, and the margin where it is known."""
        better, worse = self.sides
        row = {**asked_columns(record.prompt, self.prompts_are[0]), better: record.chosen, worse: record.rejected}
        return row | ({} if record.margin is None else {"margin": record.margin}) | more_columns(record)

    def prompt(self, row: Row) -> Prompt:
        """The prompt alone."""
        messages, tools = self.asked_of(row, find_key(row, self.prompts_are))
        return Prompt(messages, row.id, meta_of(row), tools)

    def _reply(self, row: Row, field: str, asked: tuple[Message, ...]) -> tuple[tuple[Message, ...], str]:
        """(prompt, reply): the column may repeat the prompt, with a system message that the prompt column lacks."""
        messages = self.replied(row, field)
        reply, before = reply_of(row, field, messages), messages[:-1]
        rest = [message for message in before if message.role != "system"]
        if rest and rest != [message for message in asked if message.role != "system"]:
            raise row.problem(
                field,
                "repeats another prompt (got messages that are not those of the column prompt; expected the same)",
                "other_prompt",
            )
        return (before if rest else asked), reply
