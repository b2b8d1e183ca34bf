"""Texts that spell the marks of a chat template: a template was applied to them before, and would be again."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from data_prep.types import Document, Labelled, Preference

_SIGNS = ("<|", "INST]", "<<SYS>>", "_of_turn>", "### ", "</s>")  # one of them stands in every mark: the quick look
_MARKS = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|eot_id|endoftext|user|assistant|system)\|>|\[/?INST\]|<<SYS>>"
    r"|<(?:start|end)_of_turn>|</s>(?=\s*$)|^### (?:Instruction|Response|Human|Assistant):",
    re.MULTILINE,
)


def note_marks(record: Any, notes: Counter[str]) -> None:
    """Count a record under every mark that its texts spell."""
    whole = "\n".join(spelled_texts(record))
    if not any(sign in whole for sign in _SIGNS):
        return
    found = set(_MARKS.findall(whole))
    for mark in found:
        notes[f"rows whose text spells '{mark}', as if a chat template had been applied before"] += 1


def spelled_texts(record: Any) -> list[str]:
    """Every text of a record that a template writes, or a document's."""
    if isinstance(record, Document):
        return [record.text]
    if isinstance(record, Preference):
        return [*(message.content for message in record.prompt), record.chosen, record.rejected]
    if isinstance(record, Labelled):
        return [*(message.content for message in record.prompt), record.reply]
    return [message.content for message in record.messages]
