"""dedup: drops rows that say what an earlier row said.

Exact duplicates say the same, case and white space aside (`duplicate`); with `near`, also rows whose word pairs are
nearly the same (`near_duplicate`; data_prep/quality/minhash.py). The first row stays. Training and evaluation rows are
looked at apart: a row on both sides is a leak, which is another filter's matter. So is a pair that contradicts another
(`contradictory`), and a reply called good is none of one called bad.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Optional

from data_prep.core.options import option
from data_prep.quality.minhash import NearIndex, word_pairs
from data_prep.quality.text_keys import digest, question_key, question_text, row_digest, whole_text
from data_prep.records.filter import FILTERS, Filter
from data_prep.sources.rows import Skip
from data_prep.types import Labelled, Preference


class By(Enum):
    """What is compared."""

    row = "row"
    question = "question"


@FILTERS.register("dedup")
@dataclass
class Dedup(Filter):
    """Drops rows that repeat an earlier one."""

    near: Optional[float] = option(
        None, "least share of common word pairs that makes a near duplicate, such as 0.7; null: exact ones only",
        above=0.0, high=1.0,
    )  # fmt: skip
    by: By = option(By.row, "row|question: what is compared")

    def __post_init__(self) -> None:
        self._seen: dict[str, dict[bytes, str]] = {}
        self._near: dict[str, NearIndex] = {}
        self.repeats = ""
        """Id of the row that the last dropped one repeats."""

    def step(self, record: Any) -> Any:
        """The record, or why it goes."""
        side = str(getattr(record, "meta", {}).get("split"))
        seen = self._seen.setdefault(side, {})
        key = row_digest(record) if self.by is By.row else digest(question_key(record))
        if key in seen:
            self.repeats = seen[key]
            return Skip("duplicate")
        seen[key] = record.id
        if self.near is not None and not self._contradicts(record, seen):
            text = whole_text(record) if self.by is By.row else question_text(record)
            label = f"{side} {record.good}" if isinstance(record, Labelled) else side
            index = self._near.setdefault(label, NearIndex(self.near))
            found = index.find_or_add(word_pairs(text), record.id)
            if found is not None:
                self.repeats = found
                return Skip("near_duplicate")
        return record

    @staticmethod
    def _contradicts(record: Any, seen: dict[bytes, str]) -> bool:
        """Whether an earlier pair prefers the other way round: no repetition, though the words are the same."""
        if not isinstance(record, Preference):
            return False
        return row_digest(replace(record, chosen=record.rejected, rejected=record.chosen)) in seen
