"""alpaca: {"instruction", "input", "output"} (tatsu-lab/stanford_alpaca); `response` is read as `output`.

So are `completion` and `answer`. A non-empty `input` follows the instruction after a blank line. `system` (or
`system_prompt`) and `history` ([[question, answer], ...]), as LLaMA-Factory writes them, are read when present.
"""

from __future__ import annotations

from typing import Any, ClassVar

from data_prep.formats.base import FORMATS, Format, Spellings
from data_prep.formats.column_checks import listed, meta_of, optional_text, text_field, text_of
from data_prep.sources.rows import Row, short
from data_prep.types import CONVERSATION, PROMPT, Conversation, Message

SYSTEM = ("system", "system_prompt")
_ANSWERS = ("output", "response", "completion", "answer")


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
        messages = []
        if system := optional_text(row, *SYSTEM):
            messages.append(Message("system", system))
        history = listed(row, "history", row.data.get("history") or [])
        for number, turn in enumerate(history if isinstance(history, list) else [history]):
            if not isinstance(turn, list) or len(turn) != 2:
                raise row.problem(
                    f"history[{number}]", f"wrong type (got {short(str(turn))}; expected [question, answer])"
                )
            messages.append(Message("user", text_of(row, f"history[{number}][0]", turn[0])))
            messages.append(Message("assistant", text_of(row, f"history[{number}][1]", turn[1])))
        messages.append(Message("user", asked(row, self.about)))
        messages.append(Message("assistant", text_field(row, *self.answers)))
        return Conversation(tuple(messages), row.id, meta_of(row))

    def written(self, record: Any) -> dict[str, Any]:
        """System, history, instruction and output; `input` stays empty, its text is in the instruction."""
        messages = [message.content for message in record.messages]
        system = {"system": messages.pop(0)} if record.messages[0].role == "system" else {}
        *history, instruction, output = messages if len(messages) > 1 else ["", *messages]
        turns = [history[place : place + 2] for place in range(0, len(history), 2)]
        split = {"split": record.meta["split"]} if record.meta.get("split") else {}
        row = {"instruction": instruction, self.about: "", self.answers[0]: output, **system, **split}
        return row | ({"history": turns} if turns else {})
