"""leakage: drops rows that stand in a file kept for testing, such as a benchmark (`leak`, `near_leak`).

Rows of `against` are compared with the record's question (its prompt, or a document's text), or with whole rows. The
rows of a source's own `eval_path` are compared too, by question, so that near repetitions of evaluation rows leave
training; exact ones are another matter (`on_leak`). Evaluation rows always stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Optional

from data_prep.core.hashing import sha256_json
from data_prep.core.options import option
from data_prep.filters.dedup import By
from data_prep.options import DataOptions, SourceOptions
from data_prep.quality.minhash import NearIndex, word_pairs
from data_prep.quality.text_keys import digest, question_key, question_text, row_digest, whole_text
from data_prep.records.filter import FILTERS, Filter
from data_prep.records.stream import Given, checked, open_any
from data_prep.sources.files import digest_path
from data_prep.sources.rows import Skip
from data_prep.types import DOCUMENT, PROMPT


@FILTERS.register("leakage")
@dataclass
class Leakage(Filter):
    """Drops rows that stand in a file kept for testing."""

    against: list[str] = option(None, "files kept for testing, in any format: [a.jsonl, b.csv]")
    near: Optional[float] = option(
        None, "least share of common word pairs that makes a near leak, such as 0.7; null: exact ones only",
        above=0.0, high=1.0,
    )  # fmt: skip
    by: By = option(By.question, "question|row: what is compared")

    def __post_init__(self) -> None:
        self.against = list(self.against or ())
        self._keys: set[bytes] = set()
        self._near = NearIndex(self.near if self.near is not None else 1.0)

    def begin(self, root: str | None) -> None:
        """Read the files kept for testing."""
        for path in self.against:
            for record in outside_records(path, root, whole=self.by is By.row):
                self._hold(record)

    def content(self, root: str | None) -> Any:
        """Hash of the files kept for testing."""
        return sha256_json([digest_path(path, root) for path in self.against])

    def _hold(self, record: Any) -> None:
        self._keys.add(self._key(record))
        if self.near is not None:
            self._near.add(word_pairs(self._text(record)), record.id)

    def through(self, records: Iterable[Any]) -> Iterator[Any]:
        """Evaluation rows of the source are taken in first, where they come with it."""
        listed = list(records)
        for record in listed:
            if _evaluates(record):
                self._hold(record)
        return map(self.step, listed)

    def step(self, record: Any) -> Any:
        """The record, or why it goes."""
        if _evaluates(record):
            return record
        if self._key(record) in self._keys:
            return Skip("leak")
        if self.near is not None and self._near.find(word_pairs(self._text(record))) is not None:
            return Skip("near_leak")
        return record

    def _key(self, record: Any) -> bytes:
        return row_digest(record) if self.by is By.row else digest(question_key(record))

    def _text(self, record: Any) -> str:
        return whole_text(record) if self.by is By.row else question_text(record)


def _evaluates(record: Any) -> bool:
    return bool(getattr(record, "meta", {}).get("split") == "eval")


def outside_records(path: str, root: str | None, whole: bool) -> Iterator[Any]:
    """The records of any file: whole rows, or their prompts (documents where there are none).

    Raises:
        UserError: no format knows its rows, or there are bad rows.
    """
    given = Given(DataOptions(root=root), SourceOptions(path=path))
    return checked(open_any(given) if whole else open_any(given, (PROMPT, DOCUMENT)))
