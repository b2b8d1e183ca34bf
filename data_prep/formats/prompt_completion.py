"""prompt_completion: one prompt and one answer in two columns, as text or as message lists (TRL).

The columns may be called prompt/completion, prompt/response, question/answer, query/response or input/output.
A literal "<|endoftext|>" at the end of an answer (P3/T0 exports) is cut off and counted: the template's own end token
takes its place.
"""

from __future__ import annotations

from data_prep.formats.base import (
    CONVERSATION,
    FORMATS,
    PROMPT,
    Format,
    find_key,
    need_question,
    need_reply,
    parse_messages,
    split_of,
    text_of,
)
from data_prep.sources import Row
from data_prep.types import Conversation, Message, Prompt

_END = "<|endoftext|>"
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("Question", "Answer"),
    ("query", "response"),
    ("input", "output"),
)
_PROMPTS = tuple(dict.fromkeys(left for left, _ in _PAIRS))
_ANSWERS = tuple(dict.fromkeys(right for _, right in _PAIRS))


@FORMATS.register("prompt_completion")
class PromptCompletion(Format):
    """A prompt and its answer."""

    kinds = (CONVERSATION, PROMPT)
    columns = _PROMPTS + _ANSWERS

    @classmethod
    def detect(cls, keys: frozenset[str]) -> bool:
        """One of the known pairs of columns, and no instruction."""
        return any({left, right} <= keys for left, right in _PAIRS) and not keys & {"instruction", "chosen", "messages"}

    def conversation(self, row: Row) -> Conversation:
        """The prompt's messages, then the answer's."""
        field = find_key(row, _ANSWERS)
        value = row.data[field]
        if isinstance(value, list):
            answer = parse_messages(row, field, value)
        else:
            text = text_of(row, field, value)
            if text.rstrip().endswith(_END):
                text = text.rstrip().removesuffix(_END)
                self.notes[f"literal {_END} cut off"] += 1
            answer = (Message("assistant", text_of(row, field, text)),)
        messages = self._asked(row) + answer
        need_reply(row, field, messages)
        return Conversation(messages, row.id, split_of(row))

    def prompt(self, row: Row) -> Prompt:
        """The prompt alone; the answer need not be there."""
        return Prompt(self._asked(row), row.id, split_of(row))

    def _asked(self, row: Row) -> tuple[Message, ...]:
        field = find_key(row, _PROMPTS)
        value = row.data[field]
        if isinstance(value, list):
            return need_question(row, field, parse_messages(row, field, value))
        return (Message("user", text_of(row, field, value)),)
