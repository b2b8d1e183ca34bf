"""What is in a file: columns, lengths, repetitions, leaks, pairs, refusals, languages. One row after another.

What is kept in memory grows with the rows by about a kilobyte each, for near duplicates; the rows themselves are not.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_prep.core.errors import UserError
from data_prep.filters.dedup import Dedup
from data_prep.filters.language import LEAST, language_of
from data_prep.filters.refusal import Refusal
from data_prep.filters.repair import repaired
from data_prep.filters.repetition import Repetition, repeated_share
from data_prep.prepare.data_card import histogram
from data_prep.quality.leakage import HeldOut
from data_prep.quality.pair_bias import PairNumbers
from data_prep.quality.text_keys import replies, whole_text
from data_prep.records.stream import Stream
from data_prep.sources.rows import Row, Skip, kind_of, short
from data_prep.types import Preference

LANGUAGE_ROWS, LANGUAGE_EVERY, LANGUAGE_CHARACTERS = 1000, 20, 400
"""The language is guessed of so many rows, then of every so many-th, from their first characters: the guess is slow."""
SHOWN = 20
WORST = 3


@dataclass
class Named:
    """A count, and the first rows that it counts."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, said: str) -> None:
        """Count one row, and name it while few are."""
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(said)

    def card(self) -> dict[str, Any]:
        """The count, and the rows where there are any."""
        return {"count": self.count} | ({"first": self.first} if self.first else {})


@dataclass
class Most:
    """The few rows with the largest values."""

    held: list[tuple[float, str]] = field(default_factory=list)

    def add(self, value: float, row: str) -> None:
        """Look at one row."""
        heapq.heappush(self.held, (value, row))
        if len(self.held) > WORST:
            heapq.heappop(self.held)

    def ranked(self) -> list[tuple[float, str]]:
        """(value, row), largest first."""
        return sorted(self.held, key=lambda item: (-item[0], item[1]))


class Columns:
    """The columns of raw rows: types and how often they are missing, null or empty."""

    def __init__(self) -> None:
        self._rows = 0
        self._types: dict[str, Counter[str]] = {}

    def watch(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The same rows, looked at."""
        for row in rows:
            self._rows += 1
            for name, value in row.data.items():
                self._types.setdefault(str(name), Counter())[_type(value)] += 1
            yield row

    def card(self) -> dict[str, Any]:
        """Column -> {"types": {type: rows}, "missing": rows without it or with null}, and "empty" texts and lists."""
        found = {}
        for name, types in self._types.items():
            given = {word: count for word, count in types.most_common() if word not in ("null", "empty")}
            empty = {"empty": types["empty"]} if types["empty"] else {}
            missing = self._rows - sum(types.values()) + types["null"]
            found[name] = {"types": given, "missing": missing, **empty}
        return found


def _type(value: Any) -> str:
    word = kind_of(value).removeprefix("a ").removeprefix("an ")
    return "empty" if word in ("text", "list", "object") and not (value.strip() if word == "text" else value) else word


class Statistics:
    """Everything that is counted of records.

    Args:
        near: least similarity of near duplicates and near leaks.
        held: rows of another file that must not be among these.
    """

    def __init__(self, near: float, held: HeldOut | None = None) -> None:
        self._near, self._held = near, held
        self._dedup = Dedup(near=near)
        self._pairs, self._refusal, self._repetition = PairNumbers(), Refusal(), Repetition()
        self._chars: list[int] = []
        self._reply_chars: list[int] = []
        self._named = {name: Named() for name in ("exact", "near", "refusals", "repetitive", "repairs")}
        self._leaks = {name: Named() for name in ("exact", "question", "near")}
        self._languages: Counter[str] = Counter()
        self._sides: Counter[str] = Counter()
        self._longest, self._shortest, self._repetitive = Most(), Most(), Most()
        self._missing: dict[str, str] = {}

    def add(self, record: Any) -> None:
        """Look at one record."""
        text, said = whole_text(record), replies(record)
        self._sides[str(getattr(record, "meta", {}).get("split") or "")] += 1
        self._chars.append(len(text))
        self._longest.add(len(text), record.id)
        for reply in said:
            self._reply_chars.append(len(reply))
            self._shortest.add(-len(reply), record.id)
        self._repeats(record, said)
        if isinstance(record, Preference):
            self._pairs.add(record)
        if self._held is not None:
            self._leak(record, self._held)
        if len(self._chars) <= LANGUAGE_ROWS or len(self._chars) % LANGUAGE_EVERY == 0:
            self._optional("languages", self._language, text[:LANGUAGE_CHARACTERS])
        self._optional("repairs", self._repair, record)

    def _repeats(self, record: Any, said: Sequence[str]) -> None:
        kept = self._dedup.step(record)
        if isinstance(kept, Skip):
            name = "exact" if kept.reason == "duplicate" else "near"
            self._named[name].add(f"{record.id} repeats {self._dedup.repeats}")
        if any(self._refusal.refuses(reply) for reply in said):
            self._named["refusals"].add(record.id)
        share = max((repeated_share(reply) for reply in said), default=0.0)
        if share:
            self._repetitive.add(share, record.id)
        if any(self._repetition.repeats(reply) for reply in said):
            self._named["repetitive"].add(record.id)

    def _leak(self, record: Any, held: HeldOut) -> None:
        looks: tuple[tuple[str, Callable[[Any], str | None]], ...] = (
            ("exact", held.same), ("question", held.asks_same), ("near", held.near),
        )  # fmt: skip
        for name, look in looks:
            if other := look(record):
                self._leaks[name].add(f"{record.id} is in {other}")
                return

    def _optional(self, name: str, look: Callable[[Any], None], value: Any) -> None:
        """Look with a package that may be missing; why it is not looked at is said once."""
        if name not in self._missing:
            try:
                look(value)
            except UserError as problem:
                self._missing[name] = str(problem)

    def _language(self, text: str) -> None:
        code, confidence = language_of(text)
        self._languages[code if confidence >= LEAST else "uncertain"] += 1

    def _repair(self, record: Any) -> None:
        if repaired(record) is not record:
            self._named["repairs"].add(record.id)

    def card(self) -> dict[str, Any]:
        """All counts, as `align data stats --json` prints them."""
        named = {name: each.card() for name, each in self._named.items()}
        leakage = None
        if self._held is not None:
            leakage = {name: each.card() for name, each in self._leaks.items()}
        return {
            "splits": {side or "none": count for side, count in sorted(self._sides.items())},
            "characters": _spread(self._chars),
            "reply_characters": _spread(self._reply_chars),
            "duplicates": {"exact": named["exact"], "near": named["near"], "near_from": self._near},
            "leakage": leakage,
            "pairs": self._pairs.card(),
            "refusals": named["refusals"],
            "repetitive": named["repetitive"],
            "languages": self._missing.get("languages") or dict(self._languages.most_common()),
            "repairs": self._missing.get("repairs") or named["repairs"],
            "worst": list(self._worst()),
        }

    def _worst(self) -> Iterator[dict[str, str]]:
        for value, row in self._longest.ranked():
            yield {"row": row, "why": f"long: {value:,} characters"}
        for value, row in self._shortest.ranked():
            yield {"row": row, "why": f"short reply: {-value:,} characters"}
        for value, row in self._repetitive.ranked():
            yield {"row": row, "why": f"repeats itself: {100 * value:.0f}% of a reply"}


def _spread(values: Sequence[int]) -> dict[str, Any]:
    """Mean, least, most and histogram; {} for no values."""
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "mean": round(sum(values) / len(values), 1),
        "median": ordered[len(ordered) // 2],
        "shortest": ordered[0],
        "longest": ordered[-1],
        "histogram": histogram(values),
    }


def look_at(stream: Stream, statistics: Statistics, lengths: Callable[[list[Any]], list[int]] | None) -> dict[str, Any]:
    """Read a stream to its end; returns its whole card, bad rows included.

    Args:
        stream: the records.
        statistics: what is counted of them.
        lengths: tokens of each of some records, where a model is given.
    """
    columns, tokens = Columns(), list[int]()
    stream.rows = columns.watch(stream.rows)
    batch: list[Any] = []
    for record in stream:
        statistics.add(record)
        if lengths is not None:
            batch.append(record)
            if len(batch) == 256:
                tokens += lengths(batch)
                batch.clear()
    if lengths is not None and batch:
        tokens += lengths(batch)
    tally = stream.tally
    dropped = {reason: count for reason, count in sorted(tally.dropped.items()) if count}
    rows = {"in": tally.seen, "kept": tally.seen - sum(dropped.values()), "dropped": dropped}
    return {
        "rows": rows,
        **stream.about(),
        "fields": columns.card(),
        "tokens": {**_spread(tokens), "total": sum(tokens)} if tokens else {},
        **statistics.card(),
        "bad_rows": tally.bad_rows,
        "errors": [
            {"file": bad.file, "row": bad.row, "field": bad.field, "message": short(bad.message, 400)}
            for bad in tally.first_problems()
        ],
    }
