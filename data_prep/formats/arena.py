"""arena: two models' answers to one prompt and which of them won, as Chatbot Arena publishes its votes.

{"conversation_a", "conversation_b", "winner"}, where `winner` is model_a, model_b or some tie (Zheng et al. 2023, arXiv
2306.05685); or {"prompt", "response_a", "response_b"} with `winner`, or with `winner_model_a`, `winner_model_b` and
`winner_tie`, of which one is 1. Prompts and responses may be text that spells a list of turns in JSON. Ties are
skipped, and so are battles of several turns, whose later questions follow different replies.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

from data_prep.formats.base import FORMATS, Several, Spellings, pair
from data_prep.formats.chat_format import ChatFormat
from data_prep.formats.column_checks import find_key, meta_of, number_of, text_of
from data_prep.formats.turns import need_question, reply_of
from data_prep.sources.rows import Row, Skip, short
from data_prep.types import PREFERENCE, PROMPT, Message, Preference, Prompt

_WINNERS = {"model_a": 0, "a": 0, "model_b": 1, "b": 1}
_HOT = ("winner_model_a", "winner_model_b", "winner_tie")


@FORMATS.register("arena")
class Arena(ChatFormat):
    """Two conversations side by side, and a vote."""

    kinds = (PREFERENCE, PROMPT)
    spellings: ClassVar[Spellings] = (
        ("conversation_a", "conversation_b", "winner"),
        ("prompt", "response_a", "response_b", "winner"),
        ("prompt", "response_a", "response_b", *_HOT),
    )

    def preference(self, row: Row) -> Several[Preference]:
        """The better answer over the worse."""
        won = self._winner(row)
        (asked, first), (other, second) = self._side(row, "a"), self._side(row, "b")
        if won is None:
            return Skip("tied")
        if asked != other:
            if any(message.role == "assistant" for message in asked):
                return Skip("several_turns")
            raise row.problem(
                "conversation_b",
                "answers another prompt than conversation_a (got another; expected the same)",
                "other_prompt",
            )
        replies = (first, second) if won == 0 else (second, first)
        return pair(row, asked, *replies, meta=meta_of(row))

    def prompt(self, row: Row) -> Prompt:
        """What was asked."""
        return Prompt(self._side(row, "a")[0], row.id, meta_of(row))

    def _side(self, row: Row, which: str) -> tuple[tuple[Message, ...], str]:
        """(prompt, reply) of one model."""
        if row.data.get(f"conversation_{which}") is not None:
            field = f"conversation_{which}"
            messages, _ = self.messages_of(row, field)
            return need_question(row, field, messages[:-1]), reply_of(row, field, messages)
        asked, said = (self._texts(row, field) for field in ("prompt", f"response_{which}"))
        if len(asked) != len(said):
            raise row.problem(
                f"response_{which}", f"wrong number of turns (got {len(said)}; expected {len(asked)}, as in prompt)"
            )
        turns = [(Message("user", left), Message("assistant", right)) for left, right in zip(asked, said, strict=True)]
        messages = tuple(message for turn in turns for message in turn)
        return messages[:-1], messages[-1].content

    @staticmethod
    def _texts(row: Row, field: str) -> list[str]:
        """What stands in a column turn by turn: one text, or a list of them."""
        value = row.data[find_key(row, (field,))]
        try:
            found = json.loads(value) if isinstance(value, str) and value.lstrip()[:1] == "[" else value
        except (ValueError, RecursionError):
            found = value  # a text may well begin with a bracket
        if not (isinstance(found, list) and found and (found is value or all(isinstance(one, str) for one in found))):
            return [text_of(row, field, value)]
        return [text_of(row, f"{field}[{place}]", one) for place, one in enumerate(found)]

    @staticmethod
    def _winner(row: Row) -> int | None:
        """0 or 1: the model that won; None: a tie."""
        if row.data.get("winner") is None and any(name in row.data for name in _HOT):
            votes = [number_of(row, name, row.data.get(name)) for name in _HOT]
            if sorted(votes) != [0, 0, 1]:
                raise row.problem(
                    _HOT[0], f"no winner (got {', '.join(f'{vote:g}' for vote in votes)}; expected one 1)"
                )
            return (0, 1, None)[votes.index(1)]
        value: Any = row.data[find_key(row, ("winner",))]
        said = str(value).strip().lower()
        if said in _WINNERS:
            return _WINNERS[said]
        if not said.startswith(("tie", "both")):
            raise row.problem("winner", f"wrong value (got {short(repr(value))}; expected model_a, model_b or tie)")
        return None
