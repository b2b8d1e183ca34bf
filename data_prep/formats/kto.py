"""kto: {"prompt", "completion", "label"} or {"messages", "label"}: one reply and whether it is good (arXiv 2402.01306).

The label may be called `kto_tag` (LLaMA-Factory). Dialogues are made of the good replies; preferences of a good and a
bad reply to the same prompt, where both exist.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import product
from typing import Any

from data_prep.core.errors import UserError
from data_prep.formats.alpaca import SYSTEM
from data_prep.formats.base import FORMATS, Found, Several, each, pair
from data_prep.formats.chat_format import ChatFormat
from data_prep.formats.column_checks import find_key, meta_of
from data_prep.formats.message_lists import SHAREGPT_ROLES, TOOLS, asked_columns, more_columns
from data_prep.formats.turns import need_question, reply_of
from data_prep.sources.rows import RATING, Row, Skip, kind_of, short
from data_prep.types import (
    CONVERSATION,
    PREFERENCE,
    PROMPT,
    UNPAIRED,
    Conversation,
    Labelled,
    Message,
    Preference,
    Prompt,
)

_LISTS = ("messages", "conversations")
_PROMPTS = ("prompt", "instruction")
_REPLIES = ("completion", "response", "output")
_COLUMNS = (("messages",), ("conversations",), ("prompt", "completion"), ("prompt", "response"))
_LABELS = ("label", "kto_tag")
_GOOD = ("true", "1", "1.0", "yes", "good", "desirable", "chosen", "positive", "up")
_BAD = ("false", "0", "0.0", "-1", "-1.0", "no", "bad", "undesirable", "rejected", "negative", "down")
_RATING = re.compile(r"[+-]?\d+(\.\d*)?")
_WORDS = {**dict.fromkeys(_GOOD, True), **dict.fromkeys(_BAD, False)}


@FORMATS.register("kto")
class Kto(ChatFormat):
    """A prompt, a reply, and a thumb up or down."""

    kinds = (UNPAIRED, CONVERSATION, PREFERENCE, PROMPT)
    spellings = (
        *((*columns, label) for columns in _COLUMNS for label in _LABELS),
        ("instruction", "output", "kto_tag"),
        ("instruction", "response", "kto_tag"),
    )
    extras = ("input", "history", *TOOLS, *SYSTEM)
    roles = SHAREGPT_ROLES
    writes = UNPAIRED

    @classmethod
    def uses(cls, keys: frozenset[str]) -> frozenset[str]:
        """The columns it would read of such rows; beside messages, nothing else is asked."""
        found = super().uses(keys)
        return found if found.isdisjoint(_LISTS) else found - {"input", "history"}

    def written(self, record: Any) -> dict[str, Any]:
        """The prompt, the reply as text, and its label."""
        return {
            **asked_columns(record.prompt),
            "completion": record.reply,
            "label": record.good,
            **more_columns(record),
        }

    def labelled(self, row: Row) -> Labelled:
        """The last reply, what stands before it, and its label."""
        good = self._label(row)
        field = find_key(row, (*_LISTS, *_PROMPTS))
        if field in _LISTS:
            messages, tools = self.messages_of(row, field)
            reply, asked = reply_of(row, field, messages), need_question(row, field, messages[:-1])
            return Labelled(asked, reply, good, row.id, meta_of(row), tools)
        one = self.prompt(row)
        right = find_key(row, _REPLIES)
        return Labelled(one.messages, reply_of(row, right, self.replied(row, right)), good, row.id, one.meta, one.tools)

    def conversation(self, row: Row) -> Several[Conversation]:
        """The dialogue, if its reply is good."""
        one = self.labelled(row)
        if not one.good:
            return Skip("bad_reply")
        quiet = tuple(Message(m.role, m.content, False) if m.role == "assistant" else m for m in one.prompt)
        return Conversation((*quiet, Message("assistant", one.reply)), one.id, one.meta, one.tools)

    def prompt(self, row: Row) -> Prompt:
        """What the reply answers, good or bad; neither reply nor label need be there."""
        field = find_key(row, (*_LISTS, *_PROMPTS))
        if field in _LISTS:
            messages, tools = self.messages_of(row, field)
            messages = messages[:-1] if messages and messages[-1].role == "assistant" else messages
        else:
            messages, tools = self.asked_of(row, field)
        return Prompt(need_question(row, field, messages), row.id, meta_of(row), tools)

    def preferences(self, rows: Iterable[Row]) -> Found[Preference]:
        """Every good reply over every bad one to the same prompt; prompts with one sort of reply are skipped."""
        groups: dict[str, list[tuple[Row, Labelled]]] = {}

        def place(row: Row) -> Skip:
            one = self.labelled(row)
            key = json.dumps([[m.role, m.content, m.calls] for m in one.prompt], sort_keys=True)
            groups.setdefault(key, []).append((row, one))
            return Skip("grouped")

        placed: Found[Labelled] = each(place, rows)
        yield from (problem for problem in placed if isinstance(problem, UserError))
        for members in groups.values():
            good = [member for member in members if member[1].good]
            bad = [member for member in members if not member[1].good]
            if not good or not bad:
                yield from [Skip("no_counterpart")] * len(members)
            for (row, one), (other, worse) in product(good, bad):
                try:
                    more: dict[str, Any] = {"meta": one.meta, "tools": one.tools}
                    yield pair(row, one.prompt, one.reply, worse.reply, f"#{other.row}", **more)
                except UserError as problem:
                    yield problem

    def _label(self, row: Row) -> bool:
        field = next((name for name in _LABELS if row.data.get(name) is not None), _LABELS[0])
        value: Any = row.data.get(field)
        if isinstance(value, bool):
            return value
        word = str(value).strip().lower()
        if isinstance(value, (int, float, str)) and word in _WORDS:
            return _WORDS[word]
        got = kind_of(value) if value is None else f"{kind_of(value)} {short(str(value))}"
        if _RATING.fullmatch(word):
            problem = row.problem(field, f"a rating is no label (got {got}; expected true or false)", RATING)
            problem.hint = "make good replies true and bad ones false; a rating of 1 beside it would count as good"
            raise problem
        raise row.problem(field, f"wrong type (got {got}; expected true or false, or as yes or no, good or bad)")
