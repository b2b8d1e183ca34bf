"""prompt_completion: one prompt and one answer in two columns, as text or as message lists (TRL).

The columns may be called prompt/completion, prompt/response, query/response, input/output or user/assistant; `system`
and `tools` are read when present. A literal end mark at the end of an answer (P3/T0 exports) is cut off and counted:
the template's own end token takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from data_prep.core.errors import UserError
from data_prep.formats.base import FORMATS, Spellings
from data_prep.formats.chat_format import CHAT_OPTIONS, ChatFormat
from data_prep.formats.column_checks import find_key, meta_of, text_of
from data_prep.formats.message_lists import asked_columns, message_entry, more_columns, spoken
from data_prep.formats.turns import need_reply
from data_prep.sources.rows import Row
from data_prep.types import CONVERSATION, PROMPT, Conversation, Message, Prompt, RowKind

END_MARKS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>")


@FORMATS.register("prompt_completion")
class PromptCompletion(ChatFormat):
    """A prompt and its answer."""

    kinds: ClassVar[tuple[RowKind, ...]] = (CONVERSATION, PROMPT)
    spellings: ClassVar[Spellings] = (
        ("prompt", "completion"),
        ("prompt", "response"),
        ("query", "response"),
        ("input", "output"),
        ("user", "assistant"),
    )
    extras: ClassVar[tuple[str, ...]] = (*ChatFormat.extras, "history")
    takes_context: ClassVar[bool] = True
    writes: ClassVar[str] = CONVERSATION
    option_help: ClassVar[Mapping[str, str]] = {
        **CHAT_OPTIONS,
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
        left, right = self._columns(row)
        asked, tools = self.asked_of(row, left)
        messages = asked + self.replied(row, right)
        need_reply(row, right, messages)
        return Conversation(messages, row.id, meta_of(row), tools)

    def written(self, record: Any) -> dict[str, Any]:
        """What stands before the last message, and that message; as text where there is nothing but words."""
        last = record.messages[-1:]
        answer = spoken(last, "assistant")
        completion = answer[0] if answer else [message_entry(message) for message in last]
        asked, answered = self.spellings[0]
        return {**asked_columns(record.messages[:-1], asked), answered: completion, **more_columns(record)}

    def prompt(self, row: Row) -> Prompt:
        """The prompt alone; the answer need not be there."""
        messages, tools = self.asked_of(row, find_key(row, [left for left, *_ in self.spellings]))
        return Prompt(messages, row.id, meta_of(row), tools)

    def question(self, row: Row, field: str, said: str) -> str:
        """The question without marks at its end."""
        return self._without(row, field, said, self.prompt_marks)

    def replied(self, row: Row, field: str) -> tuple[Message, ...]:
        """The answer without marks at its end."""
        found = super().replied(row, field)
        if not isinstance(row.data[field], str) or len(found) != 1 or found[-1].content != row.data[field]:
            return found
        return (*found[:-1], replace(found[-1], content=self._without(row, field, found[-1].content, self.end_marks)))

    def _columns(self, row: Row) -> tuple[str, str]:
        """The columns of prompt and answer: the first pair of names that the row has."""
        for left, right, *_ in self.spellings:
            if row.data.get(left) is not None and row.data.get(right) is not None:
                return left, right
        right = find_key(row, [right for _, right, *_ in self.spellings])
        return find_key(row, [left for left, *_ in self.spellings]), right

    def _without(self, row: Row, field: str, text: str, marks: Sequence[str]) -> str:
        """The text without the marks at its end."""
        while mark := next((mark for mark in marks if text.rstrip().endswith(mark.rstrip())), None):
            text = text.rstrip().removesuffix(mark.rstrip())
            self.notes[f"literal {mark} cut off"] += 1
        return text_of(row, field, text)
