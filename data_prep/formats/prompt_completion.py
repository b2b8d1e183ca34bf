"""prompt_completion: one prompt and one answer in two columns, as text or as message lists (TRL).

The columns may be called prompt/completion, prompt/response, query/response or input/output; `system` is read when
present. A literal end mark at the end of an answer (P3/T0 exports) is cut off and counted: the template's own end token
takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from data_prep.errors import UserError
from data_prep.formats.alpaca import SYSTEM
from data_prep.formats.base import CONVERSATION, FORMATS, PROMPT, Format, Spellings
from data_prep.formats.chat import asked_columns, message_entry, more_columns, parse_messages, spoken
from data_prep.formats.fields import find_key, meta_of, optional_text, text_of
from data_prep.formats.turns import need_question, need_reply
from data_prep.rows import Row
from data_prep.types import Conversation, Message, Prompt

END_MARKS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>")


@FORMATS.register("prompt_completion")
class PromptCompletion(Format):
    """A prompt and its answer."""

    kinds = (CONVERSATION, PROMPT)
    spellings: ClassVar[Spellings] = (
        ("prompt", "completion"),
        ("prompt", "response"),
        ("query", "response"),
        ("input", "output"),
    )
    extras: ClassVar[tuple[str, ...]] = SYSTEM
    writes: ClassVar[str] = CONVERSATION
    option_help: ClassVar[Mapping[str, str]] = {
        "end_marks": f"texts to cut off the end of answers, counted (default: {', '.join(END_MARKS)})",
        "prompt_marks": "texts to cut off the end of prompts, counted, such as ' ->' (default: none)",
    }

    def __init__(self, options: dict[str, Any] | None = None, seed: int = 0) -> None:
        super().__init__(options, seed)
        self.end_marks = self._marks("end_marks", END_MARKS)
        self.prompt_marks = self._marks("prompt_marks", ())

    def _marks(self, option: str, default: Sequence[str]) -> Sequence[str]:
        value = self.options.get(option, default)
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, (list, tuple)) or not all(isinstance(mark, str) and mark.strip() for mark in value):
            raise UserError(
                f"wrong value (got {value!r}; expected a list of texts)", field=f"options.{option}", code="bad_option"
            )
        return list(value)

    def conversation(self, row: Row) -> Conversation:
        """The prompt's messages, then the answer's."""
        field = find_key(row, [right for _, right in self.spellings])
        value = row.data[field]
        if isinstance(value, list):
            answer = parse_messages(row, field, value)
        else:
            answer = (Message("assistant", self._without(row, field, value, self.end_marks)),)
        messages = self._asked(row) + answer
        need_reply(row, field, messages)
        return Conversation(messages, row.id, meta_of(row))

    def written(self, record: Any) -> dict[str, Any]:
        """What stands before the last message, and that message; as text where there is nothing but words."""
        last = record.messages[-1:]
        answer = spoken(last, "assistant")
        completion = answer[0] if answer else [message_entry(message) for message in last]
        asked, answered = self.spellings[0]
        return {**asked_columns(record.messages[:-1], asked), answered: completion, **more_columns(record)}

    def prompt(self, row: Row) -> Prompt:
        """The prompt alone; the answer need not be there."""
        return Prompt(self._asked(row), row.id, meta_of(row))

    def _asked(self, row: Row) -> tuple[Message, ...]:
        field = find_key(row, [left for left, _ in self.spellings])
        value = row.data[field]
        system = optional_text(row, *SYSTEM)
        front = (Message("system", system),) if system else ()
        if isinstance(value, list):
            return front + need_question(row, field, parse_messages(row, field, value))
        return (*front, Message("user", self._without(row, field, value, self.prompt_marks)))

    def _without(self, row: Row, field: str, value: Any, marks: Sequence[str]) -> str:
        """The text without the marks at its end."""
        text = text_of(row, field, value)
        while mark := next((mark for mark in marks if text.rstrip().endswith(mark.rstrip())), None):
            text = text.rstrip().removesuffix(mark.rstrip())
            self.notes[f"literal {mark} cut off"] += 1
        return text_of(row, field, text)
