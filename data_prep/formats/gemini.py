"""gemini: {"contents": [{"role": "user" | "model", "parts": [{"text"}]}, ...]} with `systemInstruction` (Vertex AI).

Parts that are no text (files, function calls) are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from data_prep.formats.base import FORMATS, Format, Spellings
from data_prep.formats.column_checks import list_field, meta_of, object_of
from data_prep.formats.message_lists import parse_messages
from data_prep.formats.turns import need_reply
from data_prep.sources.rows import Row, kind_of, short
from data_prep.types import CONVERSATION, PROMPT, Conversation

_SYSTEM = ("systemInstruction", "system_instruction")
_ROLES: Mapping[str, str] = {"user": "user", "model": "assistant", "system": "system"}


@FORMATS.register("gemini")
class Gemini(Format):
    """A list of contents made of parts."""

    kinds = (CONVERSATION, PROMPT)
    spellings: ClassVar[Spellings] = (("contents",),)
    extras = _SYSTEM

    def conversation(self, row: Row) -> Conversation:
        """The contents as turns, behind the system instruction where there is one."""
        field, contents = list_field(row, "contents")
        turns = [self._turn(row, f"{field}[{place}]", value) for place, value in enumerate(contents)]
        messages = parse_messages(row, field, turns, _ROLES)
        for name in _SYSTEM:
            if row.data.get(name) is not None:
                said = {**self._turn(row, name, row.data[name]), "role": "system"}
                messages = (*parse_messages(row, name, [said], _ROLES), *messages)
        need_reply(row, field, messages)
        return Conversation(messages, row.id, meta_of(row))

    @staticmethod
    def _turn(row: Row, place: str, value: Any) -> dict[str, Any]:
        """One content as a message object with text parts."""
        content = object_of(row, place, value)
        parts = content.get("parts")
        if not isinstance(parts, list):
            raise row.problem(f"{place}.parts", f"wrong type (got {kind_of(parts)}; expected a list of parts)")
        for number, part in enumerate(parts):
            if not isinstance(part, dict) or set(part) != {"text"}:
                raise row.problem(
                    f"{place}.parts[{number}]", f"unknown part (got {short(str(part))}; expected an object with text)"
                )
        return {"role": content.get("role"), "content": [{"type": "text", "text": part["text"]} for part in parts]}
