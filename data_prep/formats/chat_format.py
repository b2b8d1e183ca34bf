"""What formats made of message lists share: their options and how a row's list becomes messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from data_prep.core.errors import UserError, unknown
from data_prep.formats.alpaca import SYSTEM, asked
from data_prep.formats.base import Format
from data_prep.formats.column_checks import find_key, listed, optional_text, text_of
from data_prep.formats.message_lists import (
    CALL,
    OPENAI_ROLES,
    parse_messages,
    parse_tools,
    spelled_messages,
    tools_as_text,
)
from data_prep.formats.transcripts import open_transcript
from data_prep.formats.turns import need_question
from data_prep.sources.rows import Row
from data_prep.types import ROLES, Message

_READ = ("role", "from", "content", "value", "train", "weight", "name", "id")
_CALLS = ("tool_calls", "function_call", "tool_call_id")
CHAT_OPTIONS: Mapping[str, str] = {
    "role": "key of a message that holds its role (default: role, or from)",
    "content": "key of a message that holds its text (default: content, or value)",
    "roles": "further names of roles, {theirs: system | user | assistant | tool | call}",
    "tools": "template (the chat template writes tools; default) or text (they are written out as plain text)",
}


class ChatFormat(Format):
    """Rows that hold a list of messages."""

    extras: ClassVar[tuple[str, ...]] = ("tools", *SYSTEM)
    option_help: ClassVar[Mapping[str, str]] = CHAT_OPTIONS
    roles: ClassVar[Mapping[str, str]] = OPENAI_ROLES

    def __init__(self, options: dict[str, Any] | None = None, seed: int = 0) -> None:
        super().__init__(options, seed)
        self.as_text = self.choice("tools", "template", "text") == "text"
        more = self.options.get("roles") or {}
        if not isinstance(more, dict):
            raise UserError(
                f"wrong value (got {more!r}; expected a mapping {{theirs: ours}})",
                field="options.roles",
                code="bad_option",
            )
        for ours in more.values():
            if ours not in (*ROLES, CALL):
                raise unknown("role", str(ours), (*ROLES, CALL))
        self.known = {**self.roles, **more}
        role, content = self.options.get("role"), self.options.get("content")
        self.keys = (str(role or "role"), str(content or "content")) if role or content else None

    def messages_of(
        self, row: Row, field: str, value: Any = None
    ) -> tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]:
        """(messages of a column, with the row's system message before them; the row's tools)."""
        value = listed(row, field, row.data[field] if value is None else value)
        messages = parse_messages(row, field, value, self.known, self.keys)
        self._note_unread(value)
        system = optional_text(row, *SYSTEM)
        if system.strip() and not (messages and messages[0].role == "system"):
            messages = (Message("system", system), *messages)
        return self._with_tools(row, messages)

    def asked_of(self, row: Row, field: str) -> tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]:
        """(what a column asks, the row's tools): messages, a text "Human: ... Assistant:", or one question."""
        value = self._said(row, field)
        if isinstance(value, list):
            messages, tools = self.messages_of(row, field, value)
            return need_question(row, field, messages), tools
        said = asked(row) if field == "instruction" else text_of(row, field, value)
        turns = open_transcript(said)
        if turns:
            self.notes["prompts read as turns of Human and Assistant"] += 1
        system = optional_text(row, *SYSTEM)
        front = (Message("system", system),) if system.strip() else ()
        return self._with_tools(row, (*front, *(turns or (Message("user", self.question(row, field, said)),))))

    def question(self, row: Row, field: str, said: str) -> str:
        """A question as it is asked; formats may cut marks off its end."""
        return said

    def replied(self, row: Row, field: str) -> tuple[Message, ...]:
        """The messages of a reply column: a text, one message, or a list of them."""
        value = self._said(row, field)
        if isinstance(value, list):
            messages = parse_messages(row, field, value, self.known, self.keys)
            self._note_unread(value)
            return tools_as_text(messages, ()) if self.as_text else messages
        return (Message("assistant", text_of(row, field, value)),)

    @staticmethod
    def _said(row: Row, field: str) -> Any:
        """What stands in a column: a list of messages, or text (or something else, which is no text then)."""
        value = spelled_messages(row.data[find_key(row, (field,))])
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            raise row.problem(
                field,
                f"wrong type (got a list of {len(value)} texts; expected one text or a list of messages; "
                f"columns={{{field}: {field}.0}} takes the first)",
            )
        return value

    def _with_tools(
        self, row: Row, messages: tuple[Message, ...]
    ) -> tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]:
        tools = parse_tools(row)
        return (tools_as_text(messages, tools), ()) if self.as_text else (messages, tools)

    def _note_unread(self, entries: list[dict[str, Any]]) -> None:
        """Count what messages say beside role and content that is not read."""
        for entry in entries:
            for key, value in entry.items() if len(entry) > 2 else ():
                if key not in (*_READ, *_CALLS, *(self.keys or ())) and isinstance(value, str | list | dict) and value:
                    self.notes[f"messages with '{key}', which is not read"] += 1
