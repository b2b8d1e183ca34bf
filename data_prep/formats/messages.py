"""messages: OpenAI chat rows, {"messages": [{"role", "content"}, ...]}; roles system, user, assistant, tool.

`tool_calls` of assistant messages and the row's `tools` go through the chat template. `train: false` (or `weight: 0`)
on an assistant message leaves that turn out of the loss; another `weight` multiplies the loss of its tokens.
"""

from __future__ import annotations

from typing import Any, ClassVar

from data_prep.formats.base import FORMATS, Spellings
from data_prep.formats.chat_format import ChatFormat
from data_prep.formats.column_checks import find_key, meta_of
from data_prep.formats.message_lists import message_entry, more_columns
from data_prep.formats.turns import need_reply
from data_prep.sources.rows import Row
from data_prep.types import CONVERSATION, PROMPT, Conversation, Message


@FORMATS.register("messages")
class Messages(ChatFormat):
    """A list of role and content objects."""

    kinds = (CONVERSATION, PROMPT)
    spellings: ClassVar[Spellings] = (("messages",),)
    columns: ClassVar[tuple[str, ...]] = ("messages",)
    writes: ClassVar[str] = CONVERSATION

    def conversation(self, row: Row) -> Conversation:
        """The messages as they stand."""
        field = find_key(row, self.columns)
        messages, tools = self.messages_of(row, field)
        need_reply(row, field, messages)
        return Conversation(messages, row.id, meta_of(row), tools)

    def written(self, record: Any) -> dict[str, Any]:
        """Messages, tools and split."""
        return {self.columns[0]: [self.entry(message) for message in record.messages], **more_columns(record)}

    def entry(self, message: Message) -> dict[str, Any]:
        """One message as an object of the list."""
        return message_entry(message)
