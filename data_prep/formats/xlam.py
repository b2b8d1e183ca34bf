"""xlam: {"query", "answers", "tools"}: a question and the tool calls that answer it (APIGen, arXiv 2406.18518).

`answers` is a list of {"name", "arguments"} and `tools` one of schemas, both mostly as JSON text. The calls are one
turn of the assistant, as the chat template writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from data_prep.core.errors import UserError
from data_prep.formats.base import FORMATS, Spellings
from data_prep.formats.chat_format import ChatFormat
from data_prep.formats.column_checks import find_key, meta_of
from data_prep.formats.message_lists import parse_message, tools_as_text
from data_prep.formats.spelled import value_of
from data_prep.sources.rows import Row
from data_prep.types import CONVERSATION, PROMPT, Conversation, Prompt


@FORMATS.register("xlam")
class Xlam(ChatFormat):
    """A question, tools, and calls of them."""

    kinds = (CONVERSATION, PROMPT)
    spellings: ClassVar[Spellings] = (("query", "answers", "tools"),)

    @classmethod
    def doubt(cls, rows: Sequence[Mapping[str, Any]], kind: str, options: Mapping[str, Any]) -> UserError | None:
        """Answers that are no calls are another format's."""
        if any(_calls(row.get("answers")) for row in rows):
            return None
        return UserError("answers hold no tool calls {name, arguments}", code="unknown_format")

    def conversation(self, row: Row) -> Conversation:
        """The query, and one turn that calls tools."""
        asked = self.prompt(row)
        given = row.data[find_key(row, ("answers",))]
        said = {"role": "assistant", "content": None, "tool_calls": _calls(given) or given}
        reply = parse_message(row, "answers", said)
        messages = (*asked.messages, reply)
        return Conversation(
            tools_as_text(messages, ()) if self.as_text else messages, row.id, meta_of(row), asked.tools
        )

    def prompt(self, row: Row) -> Prompt:
        """The query, with its tools."""
        messages, tools = self.asked_of(row, find_key(row, ("query",)))
        return Prompt(messages, row.id, meta_of(row), tools)


def _calls(value: Any) -> list[Any] | None:
    """The calls that a value is, or spells; None where it is something else."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = value_of(value)
        except ValueError:
            return None
    known = isinstance(value, list) and value and all(isinstance(one, Mapping) and "name" in one for one in value)
    return list(value) if known else None
