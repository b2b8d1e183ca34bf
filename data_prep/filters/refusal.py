"""refusal: drops rows whose reply begins by refusing ("I'm sorry, but I can't help with that", "As an AI ...").

Only the beginning is looked at, as a story may hold such words further down. English, unless `phrases` are given.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from data_prep.core.options import option
from data_prep.quality.text_keys import folded, replies
from data_prep.records.filter import FILTERS, KINDS, Filter
from data_prep.sources.rows import Skip
from data_prep.types import PROMPT

_SORRY = r"(?:(?:i am|i'm) (?:(?:very|really|truly|so) )?sorry|sorry|unfortunately|i apologi[sz]e|my apologies)"
_CANNOT = (
    r"(?:i (?:can't|cannot|can not|won't|will not|(?:do not|don't) feel comfortable)"
    r"|(?:i am|i'm) (?:not able|unable|not allowed|not comfortable|not programmed))(?: to)?"
)
_DOING = (
    r"(?:help|assist|answer|provid|comply|fulfil|do (?:that|this)|writ|creat|generat|support|engag|discuss|giv"
    r"|shar|offer|participat|continu|respond|complet|recommend)"
)
_DECLINE = r"i (?:must|have to|need to) (?:decline|refuse)"
_MODEL = r"as an? (?:ai|artificial intelligence|(?:large )?language model)\b"
ENGLISH = re.compile(rf"(?:{_SORRY}[ ,.!:;]*(?:but )?)?(?:{_CANNOT} {_DOING}|{_DECLINE}\b|{_MODEL})")
HEAD = 160
"""Folded characters of a reply that are looked at."""


@FILTERS.register("refusal")
@dataclass
class Refusal(Filter):
    """Drops rows whose reply begins by refusing."""

    kinds = tuple(kind for kind in KINDS if kind != PROMPT)
    phrases: list[str] = option(None, "beginnings of refusals, case aside, in place of the built-in English ones")

    def __post_init__(self) -> None:
        self.phrases = list(self.phrases or ())
        self._begins = tuple(folded(phrase) for phrase in self.phrases)

    def step(self, record: Any) -> Any:
        """The record, or Skip("refusal")."""
        return Skip("refusal") if any(self.refuses(reply) for reply in replies(record)) else record

    def refuses(self, reply: str) -> bool:
        """Whether a reply begins by refusing."""
        head = folded(reply[: 2 * HEAD]).replace("\u2019", "'")[:HEAD]
        return head.startswith(self._begins) if self._begins else ENGLISH.match(head) is not None
