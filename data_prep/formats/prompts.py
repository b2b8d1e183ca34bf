"""prompts: {"prompt"} alone, as text or as a message list: something to reply to, for PPO and evaluation.

`topic` is kept for rule rewards.
"""

from __future__ import annotations

from data_prep.formats.base import FORMATS, PROMPT, Format, find_key, need_question, parse_messages, split_of, text_of
from data_prep.sources import Row
from data_prep.types import Message, Prompt

_NAMES = ("prompt", "question", "query", "instruction")
_ANSWERED = {"completion", "response", "answer", "output", "chosen", "rejected", "messages", "conversations", "text"}


@FORMATS.register("prompts")
class Prompts(Format):
    """Prompts without answers."""

    kinds = (PROMPT,)
    columns = _NAMES

    @classmethod
    def detect(cls, keys: frozenset[str]) -> bool:
        """A prompt and nothing that answers it."""
        return bool(keys & set(_NAMES)) and not keys & _ANSWERED and keys <= {*_NAMES, "topic", "split", "id", "source"}

    def prompt(self, row: Row) -> Prompt:
        """The prompt's messages."""
        field = find_key(row, _NAMES)
        value = row.data[field]
        if isinstance(value, list):
            messages = need_question(row, field, parse_messages(row, field, value))
        else:
            messages = (Message("user", text_of(row, field, value)),)
        meta = split_of(row)
        if row.data.get("topic") is not None:
            meta["topic"] = str(row.data["topic"])
        return Prompt(messages, row.id, meta)
