"""What formats made of message lists share: their options and how a row's list becomes messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from data_prep.errors import UserError, unknown
from data_prep.formats.alpaca import SYSTEM
from data_prep.formats.base import Format
from data_prep.formats.chat import CALL, OPENAI_ROLES, parse_messages, parse_tools, tools_as_text
from data_prep.formats.fields import optional_text
from data_prep.rows import Row
from data_prep.types import ROLES, Message

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

    def messages_of(self, row: Row, field: str) -> tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]:
        """(messages of a column, with the row's system message before them; the row's tools)."""
        messages = parse_messages(row, field, row.data[field], self.known, self.keys)
        system = optional_text(row, *SYSTEM)
        if system.strip() and not (messages and messages[0].role == "system"):
            messages = (Message("system", system), *messages)
        tools = parse_tools(row)
        return (tools_as_text(messages, tools), ()) if self.as_text else (messages, tools)
