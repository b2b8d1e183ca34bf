"""hh: {"chosen", "rejected"}, each a whole dialogue (Bai et al. 2022, arXiv 2204.05862; anthropics/hh-rlhf).

As text with turns after "\\n\\nHuman:" and "\\n\\nAssistant:" ("System:" may stand first), or as message lists (TRL's
implicit prompt). Both sides share everything but the last reply.
"""

from __future__ import annotations

from typing import Any, ClassVar

from data_prep.formats.base import FORMATS, pair
from data_prep.formats.chat_format import ChatFormat
from data_prep.formats.column_checks import find_key, listed, meta_of, number_field, text_of
from data_prep.formats.transcripts import turns_of
from data_prep.formats.turns import need_question, reply_of, shared_prompt
from data_prep.sources.rows import Row, short
from data_prep.types import PREFERENCE, PROMPT, Message, Preference, Prompt


@FORMATS.register("hh")
class HelpfulHarmless(ChatFormat):
    """Two whole dialogues."""

    kinds = (PREFERENCE, PROMPT)
    spellings = (("chosen", "rejected"),)
    sides: ClassVar[tuple[str, str]] = ("chosen", "rejected")
    whole = True

    def preference(self, row: Row) -> Preference:
        """The shared turns as the prompt, the two last replies."""
        sides = [self._side(row, field) for field in self.sides]
        prompt, chosen, rejected = shared_prompt(row, sides[0][0], sides[1][0])
        more: dict[str, Any] = {"margin": number_field(row, "margin"), "meta": meta_of(row), "tools": sides[0][1]}
        return pair(row, prompt, chosen, rejected, **more)

    def prompt(self, row: Row) -> Prompt:
        """The shared turns, whatever is said of the replies."""
        messages, tools = self._side(row, "chosen")
        reply_of(row, "chosen", messages)
        return Prompt(need_question(row, "chosen", messages[:-1]), row.id, meta_of(row), tools)

    def _side(self, row: Row, field: str) -> tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]:
        value = row.data[find_key(row, (field,))]
        if isinstance(listed(row, field, value), list):
            return self.messages_of(row, field)
        turns, before = turns_of(text_of(row, field, value))
        if before.strip() or not turns:
            expected = "turns that start with 'Human:' and 'Assistant:', or a prompt column"
            raise row.problem(field, f"is not a dialogue (got {short(before)!r}; expected {expected})")
        for number, turn in enumerate(turns):
            if not turn.content:
                what = f"turn {number + 1} ({turn.role}) is empty (got ''; expected text)"
                raise row.problem(field, what, code="empty")
        return turns, ()
