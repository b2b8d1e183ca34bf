"""alpaca: {"instruction", "input", "output"} (tatsu-lab/stanford_alpaca); `response` is read as `output`.

A non-empty `input` follows the instruction after a blank line. `system` and `history` ([[question, answer], ...]),
as LLaMA-Factory writes them, are read when present.
"""

from __future__ import annotations

from data_prep.formats.base import CONVERSATION, FORMATS, PROMPT, Format, optional_text, split_of, text_field, text_of
from data_prep.sources import Row
from data_prep.types import Conversation, Message


@FORMATS.register("alpaca")
class Alpaca(Format):
    """One instruction, an optional input, one answer."""

    kinds = (CONVERSATION, PROMPT)
    columns = ("instruction", "input", "output", "response")

    @classmethod
    def detect(cls, keys: frozenset[str]) -> bool:
        """An instruction and an answer."""
        return "instruction" in keys and bool(keys & {"output", "response"})

    def conversation(self, row: Row) -> Conversation:
        """system, history, then instruction and input, then the output."""
        messages = []
        if system := optional_text(row, "system"):
            messages.append(Message("system", system))
        history = row.data.get("history") or []
        for number, turn in enumerate(history if isinstance(history, list) else [history]):
            if not isinstance(turn, list) or len(turn) != 2:
                raise row.problem(f"history[{number}]", "wrong type (expected [question, answer])")
            messages.append(Message("user", text_of(row, f"history[{number}][0]", turn[0])))
            messages.append(Message("assistant", text_of(row, f"history[{number}][1]", turn[1])))
        instruction = text_field(row, "instruction")
        extra = optional_text(row, "input")
        messages.append(Message("user", f"{instruction}\n\n{extra}" if extra.strip() else instruction))
        messages.append(Message("assistant", text_field(row, "output", "response")))
        return Conversation(tuple(messages), row.id, split_of(row))
