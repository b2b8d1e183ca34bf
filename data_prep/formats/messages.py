"""messages: OpenAI chat rows, {"messages": [{"role", "content"}, ...]}; roles system, user, assistant, tool.

`tool_calls` of assistant messages and the row's `tools` go through the chat template. `train: false` (or `weight: 0`)
on an assistant message leaves that turn out of the loss; another `weight` multiplies the loss of its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from data_prep.core.errors import UserError
from data_prep.formats.base import FORMATS, Spellings
from data_prep.formats.chat_format import ChatFormat
from data_prep.formats.column_checks import find_key, meta_of, truth_of
from data_prep.formats.message_lists import message_entry, more_columns
from data_prep.formats.turns import need_question, need_reply
from data_prep.sources.rows import Row
from data_prep.types import CONVERSATION, PROMPT, Conversation, Message, Prompt

_ASKING = frozenset(("user", "human", "system", "developer"))
"""Roles of those who ask."""


@FORMATS.register("messages")
class Messages(ChatFormat):
    """A list of role and content objects."""

    kinds = (CONVERSATION, PROMPT)
    spellings: ClassVar[Spellings] = (("messages",),)
    columns: ClassVar[tuple[str, ...]] = ("messages",)
    whole: ClassVar[bool] = True
    writes: ClassVar[str] = CONVERSATION

    @classmethod
    def doubt(cls, rows: Sequence[Mapping[str, Any]], kind: str, options: Mapping[str, Any]) -> UserError | None:
        """Messages that nobody answers are prompts."""
        if kind != CONVERSATION or not rows:
            return None
        lists = [row[name] for row in rows for name in cls.columns if isinstance(row.get(name), list)]
        turns = [turn for each in lists for turn in each]
        names = [turn.get("role", turn.get("from")) if isinstance(turn, dict) else None for turn in turns]
        if not turns or not _ASKING.issuperset(names):
            return None
        return UserError(
            f"the {cls.columns[0]} of the first {len(rows)} rows are prompts: there is no assistant turn to train on",
            code="format_kind",
            hint="give prompts to PPO and evaluation as data.prompts.path=FILE, and dialogues with replies here",
        )

    def conversation(self, row: Row) -> Conversation:
        """The messages as they stand."""
        field = find_key(row, self.columns)
        messages, tools = self.messages_of(row, field)
        need_reply(row, field, messages)
        return Conversation(messages, row.id, meta_of(row), tools)

    def prompt(self, row: Row) -> Prompt:
        """The messages up to the last that is not the assistant's: all of them, or what its last reply answers."""
        field = find_key(row, self.columns)
        messages, tools = self.messages_of(row, field)
        if messages and messages[-1].role == "assistant":
            last = max((place for place, one in enumerate(messages) if one.role != "assistant"), default=-1)
            if last < 0:
                raise row.problem(
                    field, "nothing to reply to (got nothing before the assistant's turn; expected a user turn)"
                )
            messages = messages[: last + 1]
        return Prompt(need_question(row, field, messages), row.id, {**meta_of(row), **truth_of(row)}, tools)

    def written(self, record: Any) -> dict[str, Any]:
        """Messages, tools and split."""
        return {self.columns[0]: [self.entry(message) for message in record.messages], **more_columns(record)}

    def entry(self, message: Message) -> dict[str, Any]:
        """One message as an object of the list."""
        return message_entry(message)
