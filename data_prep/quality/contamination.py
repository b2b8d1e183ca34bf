"""Documents of a benchmark that stand in training rows: asked there as they are, or contained nearly word for word.

A document counts as found where a row has the same question, or where one row has at least `CONTAINED` of the word
pairs of the document: a row may say much more than the document does, so that containment is what is measured, not
similarity (Broder 1997, "On the resemblance and containment of documents").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from data_prep.quality.minhash import word_pairs
from data_prep.quality.text_keys import folded, question_text, whole_text

CONTAINED = 0.8
"""Least share of a document's word pairs that one training row has."""
FEWEST = 8
"""Word pairs below which a document is found only as a whole question: few words stand in many rows by chance."""


class Documents:
    """Texts that training rows are looked through for.

    Args:
        texts: one a document.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.found: dict[int, str] = {}
        """Document -> the id of the first row that has it."""
        self._questions: dict[str, list[int]] = {}
        pairs = []
        for place, text in enumerate(texts):
            self._questions.setdefault(folded(text), []).append(place)
            pairs.append(word_pairs(text))
        self._counts = np.array([len(one) if len(one) >= FEWEST else 0 for one in pairs], dtype=np.int64)
        owners = np.repeat(np.arange(len(pairs)), [len(one) for one in pairs])
        joined = np.concatenate([np.empty(0, dtype=np.uint64), *pairs])
        order = np.argsort(joined, kind="stable")
        self._pairs, self._owners = joined[order], owners[order]

    def look_through(self, rows: Iterable[Any]) -> int:
        """Note which documents stand in the rows; returns how many rows there were."""
        count = 0
        for row in rows:
            count += 1
            for place in self._questions.get(folded(question_text(row)), ()):
                self.found.setdefault(place, row.id)
            for place in self._contained(word_pairs(whole_text(row))):
                self.found.setdefault(place, row.id)
        return count

    def _contained(self, pairs: Any) -> list[int]:
        """The documents of which a row with these word pairs has most."""
        first = np.searchsorted(self._pairs, pairs, side="left")
        last = np.searchsorted(self._pairs, pairs, side="right")
        known = np.flatnonzero(last > first)
        if not len(known):
            return []
        spans = [np.arange(first[at], last[at]) for at in known]
        shared = np.bincount(self._owners[np.concatenate(spans)], minlength=len(self._counts))
        enough = (self._counts > 0) & (shared >= CONTAINED * self._counts)
        return [int(place) for place in np.flatnonzero(enough)]
