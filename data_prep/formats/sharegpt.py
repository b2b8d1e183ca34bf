"""sharegpt: {"conversations": [{"from": "human" | "gpt" | "system", "value"}, ...]}; a `system` column is optional."""

from __future__ import annotations

from data_prep.formats.base import (
    CONVERSATION,
    FORMATS,
    PROMPT,
    Format,
    find_key,
    need_reply,
    optional_text,
    parse_messages,
    split_of,
)
from data_prep.sources import Row
from data_prep.types import Conversation, Message

_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


@FORMATS.register("sharegpt")
class ShareGpt(Format):
    """A list of from and value objects."""

    kinds = (CONVERSATION, PROMPT)
    columns = ("conversations",)

    @classmethod
    def detect(cls, keys: frozenset[str]) -> bool:
        """A column called conversations, and none that judges them."""
        return "conversations" in keys and not keys & {"chosen", "rejected", "label"}

    def conversation(self, row: Row) -> Conversation:
        """The turns as they stand."""
        field = find_key(row, ("conversations",))
        messages = parse_messages(row, field, row.data[field], _ROLES)
        if system := optional_text(row, "system"):
            messages = (Message("system", system), *messages)
        need_reply(row, field, messages)
        return Conversation(messages, row.id, split_of(row))
