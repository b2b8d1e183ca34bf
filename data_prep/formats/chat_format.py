"""What formats made of message lists share: their options and how a row's list becomes messages."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

from data_prep.core.errors import UserError, unknown
from data_prep.formats.alpaca import SYSTEM, asked, history_of, system_of
from data_prep.formats.base import Format
from data_prep.formats.column_checks import find_key, listed, optional_text, text_of, written_out
from data_prep.formats.message_lists import (
    CALL,
    OPENAI_ROLES,
    TOOLS,
    parse_messages,
    parse_tools,
    spelled_messages,
    tools_as_text,
    without_nulls,
)
from data_prep.formats.transcripts import open_transcript, turns_of
from data_prep.formats.turns import need_question
from data_prep.sources.rows import Row, kind_of, short
from data_prep.types import ROLES, Message

_READ = ("role", "from", "content", "value", "train", "loss", "weight", "name", "id")
_EXCHANGES = (
    ("input", "output"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("instruction", "response"),
    ("instruction", "output"),
    ("user", "assistant"),
    ("human", "assistant"),
    ("human", "gpt"),
)
"""Keys of objects that hold a question and its answer."""
_SPEAKERS = ("user", "assistant")
_CALLS = ("tool_calls", "function_call", "tool_call_id")
CHAT_OPTIONS: Mapping[str, str] = {
    "role": "key of a message that holds its role (default: role, or from)",
    "content": "key of a message that holds its text (default: content, or value)",
    "roles": "further names of roles, {theirs: system | user | assistant | tool | call}",
    "tools": "template (the chat template writes tools; default) or text (they are written out as plain text)",
}


QUESTIONS = ("question", "Question", "query", "problem")
"""Columns of questions: what they are about stands before them, as SQuAD is read."""
CONTEXTS = ("context", "passage", "article", "paragraph", "document", "background")
"""Columns of what a question is about."""


class ChatFormat(Format):
    """Rows that hold a list of messages, or columns that stand for one.

    Attributes:
        takes_context: text columns of `CONTEXTS` stand before a question, each with a blank line after it.
    """

    extras: ClassVar[tuple[str, ...]] = (*TOOLS, *SYSTEM)
    takes_context: ClassVar[bool] = False
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

    @classmethod
    def uses(cls, keys: frozenset[str]) -> frozenset[str]:
        """The columns that it would read of such rows, what the question is about too where it has a place for that."""
        found = super().uses(keys)
        return found | keys.intersection(CONTEXTS) if cls.takes_context and found.intersection(QUESTIONS) else found

    def messages_of(
        self, row: Row, field: str, value: Any = None
    ) -> tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]:
        """(messages of a column, with the row's system message before them; the row's tools)."""
        value = self._turns(listed(row, field, row.data[field] if value is None else value))
        value = self._meant(row, value)
        messages = parse_messages(row, field, value, self.known, self.keys)
        self._note_unread(value)
        self._note_order(messages)
        system = system_of(row).strip()
        first = messages[0].content if messages and messages[0].role == "system" else ""
        if system and not first:
            messages = (Message("system", system_of(row)), *messages)
        elif system not in first:
            name = next(name for name in SYSTEM if row.data.get(name))
            raise row.problem(
                name,
                f"says something else than the system message in {field} (got {short(system)!r} beside "
                f"{short(first)!r}; data.unused=[{name}] leaves it out)",
            )
        return self._with_tools(row, messages)

    def asked_of(self, row: Row, field: str) -> tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]:
        """(what a column asks, the row's tools): messages, a text "Human: ... Assistant:", or one question."""
        value = self._said(row, field)
        before = history_of(row) if "history" in self.extras and field != "history" else []
        if isinstance(value, list):
            messages, tools = self.messages_of(row, field, value)
            self._refuse_beside(row, field)
            own = messages[:1] if messages and messages[0].role == "system" else ()
            return need_question(row, field, (*own, *before, *messages[len(own) :])), tools
        said = asked(row) if field == "instruction" else self._about(row, field, text_of(row, field, value))
        turns = open_transcript(said)
        if turns:
            self.notes["prompts read as turns of Human and Assistant"] += 1
        system = system_of(row)
        front = (Message("system", system),) if system.strip() else ()
        last = turns or (Message("user", self.question(row, field, said)),)
        return self._with_tools(row, (*front, *before, *last))

    def _about(self, row: Row, field: str, said: str) -> str:
        """A question with what it is about: a context before it, an `input` (as Alpaca has it) after it."""
        parts = [said]
        if self.takes_context and field in QUESTIONS:
            parts = [self._context(row, name) for name in row.data if name in CONTEXTS and name != field] + parts
        if "input" in self.extras and field != "input":
            parts.append(optional_text(row, "input"))
        return "\n\n".join(part for part in parts if part.strip()) if len(parts) > 1 else said

    @staticmethod
    def _context(row: Row, name: str) -> str:
        value = row.data[name]
        if value is not None and not isinstance(value, str):
            raise row.problem(
                name,
                f"wrong type (got {kind_of(value)}; expected text to put before the question; "
                f"data.unused=[{name}] leaves it out)",
            )
        return value or ""

    def _refuse_beside(self, row: Row, field: str) -> None:
        """Refuse what would have to be put into a question that is a list of messages.

        Raises:
            UserError: there is such a column, and something stands in it.
        """
        read = self.uses(frozenset(row.data))
        names = [name for name in ("input", *CONTEXTS) if name in read and name != field]
        for name in names:
            if row.data.get(name) not in (None, ""):
                raise row.problem(
                    name, f"has no place beside a list of messages (in {field}); data.unused=[{name}] leaves it out"
                )

    def question(self, row: Row, field: str, said: str) -> str:
        """A question as it is asked; formats may cut marks off its end."""
        return said

    def replied(self, row: Row, field: str) -> tuple[Message, ...]:
        """The messages of a reply column: a text, one message, or a list of them."""
        row = written_out(row, field, self.notes)
        value = self._said(row, field)
        if isinstance(value, list):
            messages = parse_messages(row, field, self._meant(row, value), self.known, self.keys)
            self._note_unread(value)
            return tools_as_text(messages, ()) if self.as_text else messages
        return (Message("assistant", text_of(row, field, value)),)

    @staticmethod
    def _said(row: Row, field: str) -> Any:
        """What stands in a column: a list of messages, or text (or something else, which is no text then)."""
        value = spelled_messages(row, field, row.data[find_key(row, (field,))])
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            raise row.problem(
                field,
                f"wrong type (got a list of {len(value)} texts; expected one text or a list of messages; "
                f"columns={{{field}: {field}.0}} takes the first)",
            )
        return value

    def _turns(self, value: Any) -> Any:
        """A list of turns as messages, where it is clear what they are; counted.

        {"input", "output"} and the like are a question and its answer (Capybara); texts alone are turn about, the
        user's first (LIMA); one text may hold all turns, "Human: ... Assistant: ..." (HH-RLHF).
        """
        if isinstance(value, str):
            turns, before = turns_of(value)
            if len(turns) > 1 and not before.strip():
                self.notes["texts read as turns of Human and Assistant"] += 1
                return [{"role": turn.role, "content": turn.content} for turn in turns]
        if not isinstance(value, list) or not value:
            return value
        if len(value) > 1 and all(isinstance(one, str) for one in value):
            self.notes["lists of texts read as turns, the user's first"] += 1
            roles = ("user", "assistant")
            return [{"role": roles[place % 2], "content": said} for place, said in enumerate(value)]
        names = next((names for names in _EXCHANGES if all(_holds(one, names) for one in value)), None)
        if names is None:
            return value
        self.notes[f"turns read from {' and '.join(names)}"] += 1
        roles_of = (("user", names[0]), ("assistant", names[1]))
        return [{"role": role, "content": one[name]} for one in value for role, name in roles_of]

    def _meant(self, row: Row, messages: Any) -> Any:
        """Messages whose tool calls have lost the members that an Arrow table has added to them."""
        if not row.of_table or not isinstance(messages, list):
            return messages
        return [
            {key: self._pruned(row, value) if key in _CALLS else value for key, value in one.items()}
            if isinstance(one, dict)
            else one
            for one in messages
        ]

    def _pruned(self, row: Row, value: Any) -> Any:
        """A value without the null members that a table has added, as all its objects have one shape; counted."""
        if not row.of_table:
            return value
        pruned, lost = without_nulls(list(value) if isinstance(value, tuple) else value)
        if lost:
            self.notes["null members of tool calls and schemas left out, as an Arrow table adds them"] += lost
        return tuple(pruned) if isinstance(value, tuple) else pruned

    def _with_tools(
        self, row: Row, messages: tuple[Message, ...]
    ) -> tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]:
        tools = self._pruned(row, parse_tools(row))
        return (tools_as_text(messages, tools), ()) if self.as_text else (messages, tools)

    def _note_order(self, messages: tuple[Message, ...]) -> None:
        """Count dialogues whose turns do not take turns."""
        roles = [message.role for message in messages]
        if any(one == other and one in _SPEAKERS for one, other in pairwise(roles)):
            self.notes["dialogues with two turns of one role after one another"] += 1
        if "system" in roles[1:]:
            self.notes["dialogues with a system message after their first turn"] += 1

    def _note_unread(self, entries: list[dict[str, Any]]) -> None:
        """Count what messages say beside role and content that is not read."""
        for entry in entries:
            for key, value in entry.items() if len(entry) > 2 else ():
                if key not in (*_READ, *_CALLS, *(self.keys or ())) and isinstance(value, str | list | dict) and value:
                    self.notes[f"messages with '{key}', which is not read"] += 1


def _holds(one: Any, names: tuple[str, str]) -> bool:
    return isinstance(one, dict) and one.keys() >= set(names) and "role" not in one and "from" not in one
