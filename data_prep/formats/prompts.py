"""prompts: {"prompt"} alone, as text or as a message list: something to reply to, for PPO and evaluation.

It may also be called question, query or instruction (with `input`). `topic`, `ground_truth` and `instructions`
(or IFEval's `instruction_id_list` and `kwargs`) are kept for rules.
"""

from __future__ import annotations

from typing import Any

from data_prep.formats.alpaca import SYSTEM
from data_prep.formats.base import FORMATS
from data_prep.formats.chat_format import ChatFormat
from data_prep.formats.column_checks import INSTRUCTIONS, TRUTHS, find_key, meta_of, truth_of
from data_prep.formats.message_lists import TOOLS, asked_columns, more_columns
from data_prep.sources.rows import Row
from data_prep.types import PROMPT, Prompt

_NAMES = ("prompt", "question", "query", "instruction", "problem")


@FORMATS.register("prompts")
class Prompts(ChatFormat):
    """Prompts without answers."""

    kinds = (PROMPT,)
    spellings = tuple((name,) for name in _NAMES)
    extras = ("topic", "input", "history", *TRUTHS, *INSTRUCTIONS, *TOOLS, *SYSTEM)
    takes_context = True

    writes = PROMPT

    def written(self, record: Any) -> dict[str, Any]:
        """The prompt, and its topic where it is known."""
        topic = record.meta.get("topic")
        return asked_columns(record.messages) | more_columns(record) | ({"topic": topic} if topic is not None else {})

    def prompt(self, row: Row) -> Prompt:
        """The prompt's messages."""
        field = find_key(row, _NAMES)
        messages, tools = self.asked_of(row, field)
        meta = {**meta_of(row), **truth_of(row)}
        if row.data.get("topic") is not None:
            meta["topic"] = str(row.data["topic"])
        return Prompt(messages, row.id, meta, tools)
