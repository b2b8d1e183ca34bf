"""Options of `align data stats | show | dedup | split | convert`. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data_prep.core.options import listing, mapping, option
from data_prep.filters.dedup import By
from data_prep.options import DataOptions, OnBadRow, SourceOptions
from data_prep.quality.minhash import NEAR
from data_prep.records.stream import Given
from data_prep.types import RowKind


@dataclass
class FileOptions:
    """How the file is read; the same words as those of a source in a recipe."""

    format: str = option("auto", "format of the rows; auto looks at their keys")
    columns: dict[str, str] = mapping("our columns from theirs: {ours: theirs}, or {ours: 'text with {theirs} in it'}")
    parse: dict[str, str] = mapping("take texts apart into columns: {text: 'IN: {prompt} OUT: {completion}'}")
    options: dict[str, Any] = mapping("options of the format")
    limit: int | None = option(None, "read only the first rows, as many as this", low=1)
    unused: list[str] = listing("columns to leave out, though answers may depend on them")
    keep: dict[str, Any] = mapping("only rows whose columns hold this: {score: '>=4', is_safe: true}")
    on_bad_row: OnBadRow = option(OnBadRow.refuse, "refuse (name them) or drop (drop and count) bad rows")

    def source(self, path: str) -> SourceOptions:
        """The file as a source of a recipe."""
        return SourceOptions(
            path=path,
            format=self.format,
            columns=self.columns,
            parse=self.parse,
            options=dict(self.options),
            limit=self.limit,
            on_bad_row=self.on_bad_row,
        )

    def given(self, path: str) -> Given:
        """The file as it is read."""
        return Given(DataOptions(unused=self.unused, keep=self.keep), self.source(path))


@dataclass
class ReadOptions(FileOptions):
    """How the file is read, and as what."""

    kind: RowKind | None = option(
        None, "conversations|preferences|unpaired|prompts|text (default: what the format is made for)"
    )
    filters: dict[str, Any] = mapping("filters of rows, in this order: {dedup: {near: 0.8}, refusal: {}}")

    def given(self, path: str) -> Given:
        """The file as it is read."""
        data = DataOptions(filters=dict(self.filters), unused=self.unused, keep=self.keep)
        return Given(data, self.source(path))


@dataclass
class StatsOptions(ReadOptions):
    """Options of `align data stats`."""

    against: str | None = option(None, "a file kept for testing: which of these rows are in it")
    near: float = option(NEAR, "least share of common word pairs of near duplicates and near leaks", above=0.0, high=1)
    model: str | None = option(None, "also count tokens: a model preset, a folder or a hub id")


@dataclass
class ShowOptions(ReadOptions):
    """Options of `align data show`."""

    rows: str = option("1-3", "which rows: N or N-M, counted after filters")
    model: str = option("nano", "whose tokenizer and template: a model preset, a folder or a hub id")


@dataclass
class DedupOptions(FileOptions):
    """Options of `align data dedup`."""

    near: float | None = option(
        None,
        "least share of common word pairs of near duplicates, such as 0.8; null: exact ones only",
        above=0.0,
        high=1,
    )
    by: By = option(By.row, "row|question: what is compared")
    to: str = option("", "the file to write, FILE.jsonl or FILE.jsonl.gz; - is standard output")


@dataclass
class SplitOptions(FileOptions):
    """Options of `align data split`."""

    share: float = option(
        0.05, "share of the rows that evaluate, as near as whole questions allow", above=0.0, below=1.0
    )
    by: str | None = option(None, "a column: each of its values gives this share of its rows")
    train: str = option("", "the file to write with the rows to train on")
    eval: str = option("", "the file to write with the rows to evaluate on")


@dataclass
class ConvertOptions(FileOptions):
    """Options of `align data convert`."""

    form: str = option("messages", "format to write")
    to: str = option("", "the file to write, FILE.jsonl or FILE.jsonl.gz; - is standard output")
