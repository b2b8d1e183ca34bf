"""repetition: drops rows with a reply that says the same over and over.

The measure is the share of a reply's words that lie in a run of `ngram` words that stood in it before (the duplicate
n-grams of Rae et al. 2021, "Scaling Language Models", arXiv 2112.11446, table A1, counted in words). Short replies
stay: a verse or a list may repeat a line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data_prep.core.options import option
from data_prep.quality.text_keys import replies, words
from data_prep.records.filter import FILTERS, KINDS, Filter
from data_prep.sources.rows import Skip
from data_prep.types import PROMPT

NGRAM, MOST, SHORTEST = 10, 0.8, 20


def repeated_share(text: str, ngram: int = NGRAM) -> float:
    """Share of a text's words that lie in a run of `ngram` words which stood in the text before, 0 to 1."""
    listed = words(text)
    seen: set[tuple[str, ...]] = set()
    covered = 0
    until = 0
    for place in range(len(listed) - ngram + 1):
        run = tuple(listed[place : place + ngram])
        if run in seen:
            covered += place + ngram - max(until, place)
            until = place + ngram
        seen.add(run)
    return covered / len(listed) if listed else 0.0


@FILTERS.register("repetition")
@dataclass
class Repetition(Filter):
    """Drops rows with a reply that says the same over and over."""

    kinds = tuple(kind for kind in KINDS if kind != PROMPT)
    ngram: int = option(NGRAM, "words in a run that counts as repeated", low=2)
    most: float = option(MOST, "largest share of a reply's words that may lie in repeated runs", high=1.0)
    shortest: int = option(SHORTEST, "replies of fewer words are not looked at")

    def step(self, record: Any) -> Any:
        """The record, or Skip("repetition")."""
        return Skip("repetition") if any(self.repeats(reply) for reply in replies(record)) else record

    def repeats(self, reply: str) -> bool:
        """Whether a reply repeats itself more than allowed."""
        if len(reply) < self.shortest:  # a word has a character at least
            return False
        return len(words(reply)) >= self.shortest and repeated_share(reply, self.ngram) > self.most
