"""sharegpt_ranking: {"conversations": [...], "chosen", "rejected"}: a dialogue and two ways to go on (LLaMA-Factory).

`chosen` and `rejected` are a message {"from", "value"} (or {"role", "content"}), or text. `messages` may hold the
dialogue instead.
"""

from __future__ import annotations

from typing import Any

from data_prep.formats.base import FORMATS, pair
from data_prep.formats.chat_format import ChatFormat
from data_prep.formats.column_checks import find_key, meta_of, number_field
from data_prep.formats.message_lists import SHAREGPT_ROLES
from data_prep.formats.turns import need_question, reply_of
from data_prep.sources.rows import Row
from data_prep.types import PREFERENCE, PROMPT, Preference, Prompt


@FORMATS.register("sharegpt_ranking")
class ShareGptRanking(ChatFormat):
    """A dialogue and two replies."""

    kinds = (PREFERENCE, PROMPT)
    spellings = (("conversations", "chosen", "rejected"), ("conversation", "chosen", "rejected"))
    roles = SHAREGPT_ROLES

    def preference(self, row: Row) -> Preference:
        """The dialogue as the prompt, and both replies."""
        asked = self.prompt(row)
        chosen, rejected = (reply_of(row, field, self.replied(row, field)) for field in ("chosen", "rejected"))
        more: dict[str, Any] = {"margin": number_field(row, "margin"), "meta": asked.meta, "tools": asked.tools}
        return pair(row, asked.messages, chosen, rejected, **more)

    def prompt(self, row: Row) -> Prompt:
        """The dialogue so far."""
        field = find_key(row, ("conversations", "conversation"))
        messages, tools = self.messages_of(row, field)
        return Prompt(need_question(row, field, messages), row.id, meta_of(row), tools)
