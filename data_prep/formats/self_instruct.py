"""self_instruct: {"instruction", "instances": [{"input", "output"}, ...]} (seed tasks of yizhongw/self-instruct).

Every instance is a dialogue of its own; a non-empty `input` follows the instruction after a blank line.
"""

from __future__ import annotations

from typing import ClassVar

from data_prep.core.errors import UserError
from data_prep.formats.alpaca import asked
from data_prep.formats.base import FORMATS, Format, Several
from data_prep.formats.column_checks import list_field, meta_of, object_of, text_field
from data_prep.sources.rows import Row, Skip
from data_prep.types import CONVERSATION, PROMPT, Conversation, Message


@FORMATS.register("self_instruct")
class SelfInstruct(Format):
    """One instruction with examples of it."""

    kinds = (CONVERSATION, PROMPT)
    spellings = (("instruction", "instances"),)
    extras: ClassVar[tuple[str, ...]] = ("is_classification",)

    def conversation(self, row: Row) -> Several[Conversation]:
        """One dialogue per instance."""
        field, instances = list_field(row, "instances")
        talks: list[Conversation | Skip | UserError] = []
        for number, value in enumerate(instances):
            place = f"{field}[{number}]"
            one = object_of(row, place, value)
            whole = {key: row.data[key] for key in ("instruction",) if key in row.data}
            inner = Row(row.file, row.row, {**whole, "output": None, **one})
            messages = (Message("user", asked(inner)), Message("assistant", text_field(inner, "output")))
            identity = row.id if len(instances) == 1 else f"{row.id}#{number + 1}"
            talks.append(Conversation(messages, identity, meta_of(row)))
        return talks
