"""alpaca: {"instruction", "input", "output"} (tatsu-lab/stanford_alpaca); `response` is read as `output`.

So are `completion` and `answer`. A non-empty `input` follows the instruction after a blank line. `system` (or
`system_prompt`) and `history` ([[question, answer], ...]), as LLaMA-Factory writes them, are read when present.
"""

from __future__ import annotations

from typing import Any, ClassVar

from data_prep.formats.base import FORMATS, Format, Spellings
from data_prep.formats.column_checks import (
    find_key,
    listed,
    meta_of,
    optional_text,
    text_field,
    text_of,
    written_out,
)
from data_prep.formats.message_lists import parse_messages
from data_prep.sources.rows import Row, short
from data_prep.types import CONVERSATION, PROMPT, Conversation, Message, Prompt

SYSTEM = ("system", "system_prompt", "system_message")
_ANSWERS = ("output", "response", "completion", "answer")


def system_of(row: Row) -> str:
    """The row's system message: what its columns for one say, a paragraph each."""
    said = dict.fromkeys(text for name in SYSTEM if (text := optional_text(row, name)).strip())
    return "\n\n".join(said)


def history_of(row: Row, field: str = "history") -> list[Message]:
    """The turns before the question, from [[question, answer], ...] or a list of messages; [] where there are none.

    Raises:
        UserError: another form, of which it is not known who speaks.
    """
    history = listed(row, field, row.data.get(field) or [])
    if isinstance(history, str) and not history.strip():
        return []
    if isinstance(history, list) and history and all(isinstance(turn, dict) for turn in history):
        return list(parse_messages(row, field, history))
    messages = []
    for number, turn in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(turn, list) or len(turn) != 2:
            raise row.problem(f"{field}[{number}]", f"wrong type (got {short(str(turn))}; expected [question, answer])")
        messages.append(Message("user", text_of(row, f"{field}[{number}][0]", turn[0])))
        messages.append(Message("assistant", text_of(row, f"{field}[{number}][1]", turn[1])))
    return messages


def asked(row: Row, extra: str = "input") -> str:
    """The instruction, and below a blank line the text that it is about, where there is one."""
    about = optional_text(row, extra)
    instruction = text_field(row, "instruction")
    return f"{instruction}\n\n{about}" if about.strip() else instruction


@FORMATS.register("alpaca")
class Alpaca(Format):
    """One instruction, an optional input, one answer."""

    kinds = (CONVERSATION, PROMPT)
    spellings: ClassVar[Spellings] = tuple(("instruction", name) for name in _ANSWERS)
    extras: ClassVar[tuple[str, ...]] = ("input", "history", *SYSTEM)
    about: ClassVar[str] = "input"
    answers: ClassVar[tuple[str, ...]] = _ANSWERS
    writes: ClassVar[str] = CONVERSATION

    def conversation(self, row: Row) -> Conversation:
        """System, history, then instruction and input, then the output."""
        messages = self._before(row)
        field = find_key(row, self.answers)
        row = written_out(row, field, self.notes)
        messages.append(Message("assistant", text_field(row, field)))
        return Conversation(tuple(messages), row.id, meta_of(row))

    def prompt(self, row: Row) -> Prompt:
        """The same without the output, which need not be there."""
        return Prompt(tuple(self._before(row)), row.id, meta_of(row))

    def _before(self, row: Row) -> list[Message]:
        """System, history, instruction and input."""
        system = system_of(row)
        front = [Message("system", system)] if system else []
        return [*front, *history_of(row), Message("user", asked(row, self.about))]

    def written(self, record: Any) -> dict[str, Any]:
        """System, history, instruction and output; `input` stays empty, its text is in the instruction."""
        messages = [message.content for message in record.messages]
        system = {"system": messages.pop(0)} if record.messages[0].role == "system" else {}
        *history, instruction, output = messages if len(messages) > 1 else ["", *messages]
        turns = [history[place : place + 2] for place in range(0, len(history), 2)]
        split = {"split": record.meta["split"]} if record.meta.get("split") else {}
        row = {"instruction": instruction, self.about: "", self.answers[0]: output, **system, **split}
        return row | ({"history": turns} if turns else {})
