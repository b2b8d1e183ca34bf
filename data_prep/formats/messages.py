"""messages: OpenAI chat rows, {"messages": [{"role", "content"}, ...]}; roles system, user, assistant, tool.

`train: false` (or OpenAI's `weight: 0`) on an assistant message leaves that turn out of the loss.
"""

from __future__ import annotations

from data_prep.formats.base import CONVERSATION, FORMATS, PROMPT, Format, find_key, need_reply, parse_messages, split_of
from data_prep.sources import Row
from data_prep.types import Conversation


@FORMATS.register("messages")
class Messages(Format):
    """A list of role and content objects."""

    kinds = (CONVERSATION, PROMPT)
    columns = ("messages",)

    @classmethod
    def detect(cls, keys: frozenset[str]) -> bool:
        """A column called messages, and none that judges them."""
        return "messages" in keys and not keys & {"chosen", "rejected", "label"}

    def conversation(self, row: Row) -> Conversation:
        """The messages as they stand."""
        field = find_key(row, ("messages",))
        messages = parse_messages(row, field, row.data[field])
        need_reply(row, field, messages)
        return Conversation(messages, row.id, split_of(row))
