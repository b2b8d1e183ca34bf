"""sharegpt_ranking: {"conversations": [...], "chosen", "rejected"}: a dialogue and two ways to go on (LLaMA-Factory).

`chosen` and `rejected` are a message {"from", "value"} (or {"role", "content"}), or text. `messages` may hold the
dialogue instead.
"""

from __future__ import annotations

from typing import Any

from data_prep.formats.base import FORMATS, PREFERENCE, PROMPT, pair
from data_prep.formats.chat import parse_message, tools_as_text
from data_prep.formats.chat_format import ChatFormat
from data_prep.formats.fields import find_key, meta_of, number_field, object_of, text_of
from data_prep.formats.sharegpt import SHAREGPT_ROLES
from data_prep.formats.turns import need_question, reply_of
from data_prep.rows import Row
from data_prep.types import Preference, Prompt


@FORMATS.register("sharegpt_ranking")
class ShareGptRanking(ChatFormat):
    """A dialogue and two replies."""

    kinds = (PREFERENCE, PROMPT)
    spellings = (("conversations", "chosen", "rejected"), ("conversation", "chosen", "rejected"))
    roles = SHAREGPT_ROLES

    def preference(self, row: Row) -> Preference:
        """The dialogue as the prompt, and both replies."""
        asked = self.prompt(row)
        chosen, rejected = (self._reply(row, field) for field in ("chosen", "rejected"))
        more: dict[str, Any] = {"margin": number_field(row, "margin"), "meta": asked.meta, "tools": asked.tools}
        return pair(row, asked.messages, chosen, rejected, **more)

    def prompt(self, row: Row) -> Prompt:
        """The dialogue so far."""
        field = find_key(row, ("conversations", "conversation"))
        messages, tools = self.messages_of(row, field)
        return Prompt(need_question(row, field, messages), row.id, meta_of(row), tools)

    def _reply(self, row: Row, field: str) -> str:
        value: Any = row.data[find_key(row, (field,))]
        if isinstance(value, str) and value.lstrip()[:1] == "{":
            value = object_of(row, field, value)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if not isinstance(value, dict):
            return text_of(row, field, value)
        said = (parse_message(row, field, value, self.known, self.keys),)
        return reply_of(row, field, tools_as_text(said, ()) if self.as_text else said)
