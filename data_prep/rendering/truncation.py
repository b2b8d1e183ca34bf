"""Rows that are too long: which part is to blame, and cutting that part at the level of messages.

What is cut is text, before it is rendered again: control tokens, the bos and the generation prompt always stay whole,
and a cut row still is prompt(...) + reply(...). An answer keeps its end token unless `open` is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_prep.core.errors import UserError
from data_prep.options import Keep, LengthOptions, OnLong, OnLongAnswer
from data_prep.rendering.renderer import Renderer
from data_prep.types import Conversation, Labelled, LabelledTokens, Message, PairTokens, Preference, Prompt, Tokens

Fits = Callable[[Any], bool]


@dataclass(frozen=True)
class TooLong:
    """A row over the limit that is not kept: its id and length in tokens, whether its answer is to blame, the rule."""

    id: str
    tokens: int
    answer: bool
    rule: str


def length_of(row: Any) -> int:
    """Tokens of a rendered row; of a pair with the longer of its replies."""
    if isinstance(row, PairTokens):
        return len(row.prompt) + max(len(row.chosen), len(row.rejected))
    if isinstance(row, LabelledTokens):
        return len(row.prompt) + len(row.reply)
    return len(row.ids)


def answer_of(row: Any) -> int:
    """Tokens of the answer that ends a rendered row; of a pair those of the longer one; 0 for a prompt."""
    if isinstance(row, PairTokens):
        return max(len(row.chosen), len(row.rejected))
    if isinstance(row, LabelledTokens):
        return len(row.reply)
    if not isinstance(row, Tokens) or True not in row.mask:
        return 0
    last = len(row.mask) - 1 - row.mask[::-1].index(True)
    start = last
    while start and row.mask[start - 1]:
        start -= 1
    return last + 1 - start


class Shortener:
    """Shortens the rows of one kind.

    Args:
        renderer: what renders them.
        length: the rules.
    """

    def __init__(self, renderer: Renderer, length: LengthOptions) -> None:
        self._renderer = renderer
        self._length = length
        self._answers = length.answer_rule
        self.max_length = length.max_length

    def shorten(self, record: Any, row: Any) -> Any:
        """A shorter rendered row, or why there is none (TooLong).

        Args:
            record: what the row was rendered from.
            row: the rendered row, longer than `max_length`.
        """
        cuts_prompt = self._length.on_long is OnLong.truncate
        if cuts_prompt and (cut := self._cut_prompt(record)) is not None:
            return cut
        blamed = answer_of(row) > 0 and (cuts_prompt or 2 * answer_of(row) > length_of(row))
        rule = self._answers.value if blamed else self._length.on_long.value
        if blamed and self._answers is OnLongAnswer.open:
            found = self._opened(row)
        elif blamed and self._answers is OnLongAnswer.truncate:
            found = self._cut_answer(record, cuts_prompt)
        else:
            found = None
        return TooLong(record.id, length_of(row), blamed, rule) if found is None else found

    # ------------------------------------------------------------------ insides
    def _rendered(self, record: Any) -> Any:
        """The rendered record, or None where the template refuses it."""
        render: dict[type, Callable[[Sequence[Any]], Sequence[Any]]] = {
            Conversation: self._renderer.conversations,
            Preference: self._renderer.pairs,
            Labelled: self._renderer.labelled,
            Prompt: self._renderer.prompts,
        }
        (row,) = render[type(record)]([record])
        return None if isinstance(row, UserError) else row

    def _fits(self, record: Any, limit: int | None = None) -> bool:
        row = self._rendered(record)
        return row is not None and length_of(row) <= (self._length.max_length if limit is None else limit)

    def _cut_prompt(self, record: Any) -> Any:
        """The rendered record with a shorter prompt, or None."""
        shorter = shorter_prompt(record, self._fits, self._length.keep_prompt)
        return None if shorter is None else self._rendered(shorter)

    def _cut_answer(self, record: Any, and_prompt: bool) -> Any:
        """The rendered record with shorter answers (and, if it must be, a shorter prompt), or None."""
        shorter = shorter_answers(record, self._fits)
        if shorter is not None:
            return self._rendered(shorter)
        if not and_prompt:
            return None
        half = shorter_answers(record, lambda one: answer_of(self._rendered(one)) <= self._length.max_length // 2)
        return None if half is None else self._cut_prompt(half)

    def _opened(self, row: Any) -> Any:
        """The row's first tokens, if some of them still are supervised; the answer then has no end."""
        limit = self._length.max_length
        if isinstance(row, PairTokens):
            room = limit - len(row.prompt)
            return replace(row, chosen=row.chosen[:room], rejected=row.rejected[:room]) if room > 0 else None
        if isinstance(row, LabelledTokens):
            room = limit - len(row.prompt)
            return replace(row, reply=row.reply[:room]) if room > 0 else None
        weights = None if row.weights is None else row.weights[:limit]
        return (
            replace(row, ids=row.ids[:limit], mask=row.mask[:limit], weights=weights)
            if any(row.mask[1:limit])
            else None
        )


def most(high: int, fits: Callable[[int], bool]) -> int:
    """The greatest number from 1 to `high` that fits (smaller ones then do), or 0."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def messages_of(record: Any) -> tuple[Message, ...]:
    """The messages of a dialogue or a prompt, or those that a reply answers."""
    found: tuple[Message, ...] = record.messages if hasattr(record, "messages") else record.prompt
    return found


def _with(record: Any, messages: Sequence[Message]) -> Any:
    name = "messages" if hasattr(record, "messages") else "prompt"
    return replace(record, **{name: tuple(messages)})


def shorter_prompt(record: Any, fits: Fits, keep: Keep) -> Any:
    """The record with less before its answer: first without whole exchanges, then with the longest text cut.

    A dialogue to imitate loses its first exchanges, or its last ones where beginnings are kept; what is asked in the
    end (of a prompt, a preference) always stays. System messages and answers stay whole.
    """
    messages = _trimmed(record)
    head = next((place for place, message in enumerate(messages) if message.role != "system"), len(messages))
    front, rest = messages[:head], messages[head:]
    starts = [place for place, message in enumerate(rest) if message.role == "user"]
    if keep is Keep.start and isinstance(record, Conversation):
        ends = [place + 1 for place, message in enumerate(rest) if message.role == "assistant" and message.trained]
        number = most(len(ends), lambda n: fits(_with(record, front + rest[: ends[n - 1]])))
        if number:
            return _with(record, front + rest[: ends[number - 1]])
        rest = rest[: ends[0]] if ends else rest
    else:
        number = most(len(starts), lambda n: fits(_with(record, front + rest[starts[-n] :])))
        if number:
            return _with(record, front + rest[starts[-number] :])
        rest = rest[starts[-1] :] if starts else rest
    return _cut_text(_with(record, front + rest), head, fits, keep)


def _trimmed(record: Any) -> tuple[Message, ...]:
    """The messages of a record; of a dialogue up to its last supervised reply, as nothing behind it is learnt."""
    messages = messages_of(record)
    if not isinstance(record, Conversation):
        return messages
    last = max(place for place, message in enumerate(messages) if message.role == "assistant" and message.trained)
    return messages[: last + 1]


def _cut_text(record: Any, head: int, fits: Fits, keep: Keep) -> Any:
    """The record with its longest user's or tool's text cut, or None if that is not enough."""
    messages = messages_of(record)
    places = [place for place in range(head, len(messages)) if messages[place].role in ("user", "tool")]
    if not places:
        return None
    place = max(places, key=lambda one: len(messages[one].content))
    text = messages[place].content

    def cut(size: int) -> Any:
        kept = text[-size:] if keep is Keep.end else text[:size]
        return _with(record, [*messages[:place], replace(messages[place], content=kept), *messages[place + 1 :]])

    size = most(len(text) - 1, lambda n: fits(cut(n)))
    shorter = cut(size) if size else None
    return shorter if shorter is not None and messages_of(shorter)[place].content.strip() else None


def shorter_answers(record: Any, fits: Fits) -> Any:
    """The record with its answer (a pair: both) cut to the same number of characters at most, or None."""
    if isinstance(record, Conversation):
        messages = _trimmed(record)
        texts = [messages[-1].content]
    else:
        texts = [record.chosen, record.rejected] if isinstance(record, Preference) else [record.reply]

    def cut(size: int) -> Any:
        if isinstance(record, Conversation):
            return _with(record, [*messages[:-1], replace(messages[-1], content=texts[0][:size])])
        names = ("chosen", "rejected") if isinstance(record, Preference) else ("reply",)
        return replace(record, **{name: text[:size] for name, text in zip(names, texts, strict=True)})

    size = most(max(map(len, texts)), lambda n: fits(cut(n)))
    return cut(size) if size and all(text[:size].strip() for text in texts) else None
