"""From gathered chunks to prepared rows: sides, what is lost, the mixture, the data card; and both ways to the disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.core.errors import UserError
from data_prep.core.hashing import sha256_json
from data_prep.options import DataOptions, LengthOptions, OnLeak
from data_prep.prepare.arrow_rows import Rows
from data_prep.prepare.collect import ROWS, SAID, CollectedRows, SwappedPairs
from data_prep.prepare.data_card import histogram, samples
from data_prep.quality.leakage import check_overlap
from data_prep.records.mixing import Source, drawn
from data_prep.records.stream import VERSION, Stream
from data_prep.records.tally import SHOWN, Tally, check_long
from data_prep.rendering.renderer import Renderer
from data_prep.rendering.truncation import TooLong
from data_prep.splitting import EVAL, LEAK, OVERLAP, TRAIN, choose_sides
from data_prep.types import DOCUMENT, Prepared, RowKind

Numbers = npt.NDArray[Any]
TOKENS = "tokens.npy"
QUESTIONS = ("asked", "held")
"""Fields of `Prepared` that have a file of their own."""


@dataclass
class Reading:
    """What was read: the sources of one kind of rows, their streams, and the record at which each of them ends."""

    kind: RowKind
    data: DataOptions
    sources: list[Source]
    streams: list[Stream]
    ends: list[int]

    def spans(self) -> Iterator[tuple[Source, Stream, slice]]:
        """Every source with its stream and its records."""
        starts = [0, *self.ends]
        for place, (source, stream) in enumerate(zip(self.sources, self.streams, strict=True)):
            yield source, stream, slice(starts[place], self.ends[place])


@dataclass
class _Lost:
    """What did not become a row, or not as a whole."""

    tally: Tally = field(default_factory=Tally)
    long: list[TooLong] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)

    def named(self) -> dict[str, Any]:
        """The first rows that are bad, too long or cut, by name; the counts of all stand in `rows`."""
        long = [f"{row.id}: {row.tokens} tokens{' (the answer)' if row.answer else ''}" for row in self.long[:SHOWN]]
        named = {
            "bad_rows": [str(problem) for problem in self.tally.first_problems()],
            "long_rows": long,
            "truncated_rows": self.cut[:SHOWN],
        }
        answers = sum(row.answer for row in self.long)
        more = {"long_for_their_answer": answers} if answers else {}
        return {**{name: rows for name, rows in named.items() if rows}, **more}


def settled(
    reading: Reading,
    gathered: CollectedRows,
    renderer: Renderer,
    length: LengthOptions,
    seed: int,
    numbers: dict[str, Any],
) -> Prepared[Any]:
    """Choose sides, check what is lost and what is left, draw the mixture, write the card.

    Raises:
        UserError: bad rows, leaks or long rows that are not to be dropped, or no training row is left.
    """
    ranks, wishes, pieces = gathered.records_of()
    sides, rule = _sides(reading, ranks, wishes, pieces)
    refusing = (one.given.option + "on_leak" for one in reading.sources if one.given.source.on_leak is OnLeak.refuse)
    overlap, sides = check_overlap(gathered.said, sides, next(refusing, None), reading.kind == DOCUMENT)
    facts = gathered.facts()
    side_of_row = sides[facts["record"]]
    train, held = np.flatnonzero(side_of_row == TRAIN), np.flatnonzero(side_of_row == EVAL)
    held = held[np.argsort(ranks[facts["record"][held]], kind="stable")]
    lost = _lost(reading, gathered, sides, pieces, len(train) + len(held))
    check_long(lost.long, len(train) + len(held) + len(lost.long), length)
    rows = _row_numbers(reading, lost, len(train), len(held))
    which = np.searchsorted(np.array(reading.ends), facts["record"], side="right")
    order, mixture = drawn(reading.sources, which, train, held, reading.data.temperature, seed)
    flips = np.unique(order[facts["flip"][order]]).astype(np.uint32)
    about = _about(reading)
    if facts["flip"].any():
        about["notes"]["training labels flipped on purpose (noise)"] = int(facts["flip"][train].sum())
    if reading.kind == DOCUMENT:
        kept = (sides == TRAIN) | (sides == EVAL)
        about["notes"]["documents cut into pieces"] = int((pieces[kept] > 1).sum())
    said = [facts["digest"][order], facts["flip"][order], facts["digest"][held]]
    hashed = [hashlib.sha256(one.tobytes()).hexdigest() for one in said]
    digest = sha256_json([VERSION, renderer.template_digest, renderer.tokenizer_digest, hashed])
    rows_of_train = gathered.rows(order.astype(np.uint32), SwappedPairs(flips) if len(flips) else None)
    card = {
        "source": ", ".join(source.given.label for source in reading.sources),
        "license": reading.data.license,
        **about,
        **numbers,
        "rows": rows,
        "splits": {"train": len(order), "eval": len(held), "rule": rule},
        **({"mixture": mixture} if mixture else {}),
        **_token_numbers(facts[np.concatenate([train, held])]),
        "overlap": overlap,
        "choices": dict(renderer.choices),
        "template_digest": renderer.template_digest,
        "tokenizer_digest": renderer.tokenizer_digest,
        "max_length": length.max_length,
        **lost.named(),
        "samples": samples(rows_of_train, renderer),
        "digest": digest,
    }
    ended = float(facts["ended"][np.concatenate([train, held])].mean())
    rows_of_eval = gathered.rows(held.astype(np.uint32), None)
    asked, questions = (ranks[facts["record"][rows]] for rows in (train, held))
    return Prepared(rows_of_train, rows_of_eval, card, digest, gathered.highest, ended, np.unique(asked), questions)


def _sides(reading: Reading, ranks: Numbers, wishes: Numbers, pieces: Numbers) -> tuple[Numbers, str]:
    """The side of every record, chosen source by source, and the rule; no question stands on both sides anywhere."""
    sides = np.zeros(len(ranks), dtype=np.uint8)
    rules = []
    for source, stream, own in reading.spans():
        sides[own], rule = choose_sides(ranks[own], wishes[own], pieces[own], source.given.source)
        rules.append(stream.negatives.rule if stream.negatives else rule)
    if len(rules) > 1:
        sides[(sides == TRAIN) & np.isin(ranks, ranks[sides == EVAL])] = OVERLAP
    return sides, "; ".join(dict.fromkeys(rules))


def _lost(reading: Reading, gathered: CollectedRows, sides: Numbers, pieces: Numbers, kept: int) -> _Lost:
    """What was lost in all sources; a record that stands on no side is not looked at.

    Raises:
        UserError: bad rows that are not to be dropped.
    """
    counts = (sides == TRAIN) | (sides == EVAL)
    lost = _Lost()
    for source, stream, own in reading.spans():
        among = np.zeros_like(counts)
        among[own] = counts[own]
        numbers, problems = gathered.bad(among)
        stream.tally.bad_rows += sum(numbers.values())
        stream.tally.problems += problems
        stream.tally.dropped += numbers
        stream.tally.check_bad_rows(source.given.source.on_bad_row)
        lost.tally.take(stream.tally)
    lost.long = [row for place, row in gathered.long if counts[place]]
    lost.cut = [name for place, name in gathered.cut if counts[place]]
    lost.tally.dropped["too_long"] += len(lost.long)
    lost.tally.dropped["question_in_eval"] += int((sides == OVERLAP).sum())
    lost.tally.dropped["leak"] += int((sides == LEAK).sum())
    if reading.kind == DOCUMENT:
        made = int(pieces[counts].sum())
        lost.tally.seen += made - int(counts.sum())
        lost.tally.dropped["one_token_piece"] += made - kept
    return lost


def _row_numbers(reading: Reading, lost: _Lost, train: int, held: int) -> dict[str, Any]:
    """The card's `rows`; the sum is asserted.

    Raises:
        UserError: no training row is left.
    """
    seen = lost.tally.seen
    dropped = {reason: count for reason, count in sorted(lost.tally.dropped.items()) if count}
    if not train:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or f"all {held} evaluate"
        label = reading.sources[0].given.label
        raise UserError(
            f"no training row is left of {seen} ({reasons})",
            code="no_rows",
            file=label,
            hint="pairs need a good and a bad reply to one prompt" if dropped.get("no_counterpart") else None,
        )
    assert seen == train + held + sum(dropped.values()), (seen, train, held, dropped)
    return {"in": seen, "kept": train + held, "dropped": dropped, "truncated": len(lost.cut)}


def _about(reading: Reading) -> dict[str, Any]:
    """What the card says of the sources: of the only one, or the first with those of all under `sources`."""
    each = [stream.about() for stream in reading.streams]
    if len(each) == 1:
        return each[0]
    named = {str(source.name): one for source, one in zip(reading.sources, each, strict=True)}
    formats = ", ".join(dict.fromkeys(one["format"] for one in each))
    total = sum(one["source_rows"] for one in each)
    return {"kind": reading.kind, "format": formats, "source_rows": total, "notes": {}, "sources": named}


def _token_numbers(facts: Numbers) -> dict[str, Any]:
    """`tokens` and `supervised_share` of the card; a pair's supervised tokens are those of both replies."""
    total, supervised = int(facts["tokens"].sum()), int(facts["supervised"].sum())
    numbers = {
        "total": total,
        "supervised": supervised,
        "mean": round(float(facts["length"].mean()), 2),
        "longest": int(facts["length"].max()),
        "histogram": histogram(facts["length"]),
    }
    return {"tokens": numbers, "supervised_share": round(supervised / total, 4)}


def save(folder: Path, prepared: Prepared[Any]) -> None:
    """Write beside the rows what is needed to read them again."""
    (folder / SAID).unlink(missing_ok=True)
    assert isinstance(prepared.train, Rows)
    np.save(folder / TOKENS, prepared.train.tokens)  # of all rows of the file, whichever side they stand on
    for name, rows in (("train", prepared.train), ("eval", prepared.eval)):
        assert isinstance(rows, Rows)
        np.save(folder / f"{name}.npy", rows.order)
        if isinstance(rows.change, SwappedPairs):
            np.save(folder / f"{name}.flips.npy", rows.change.numbers)
    for name in QUESTIONS:
        np.save(folder / f"{name}.npy", getattr(prepared, name))
    record = {"card": prepared.card, "highest": prepared.highest, "ended": prepared.ended}
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")


def load(folder: Path) -> Prepared[Any]:
    """What `save` wrote."""
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    tokens = np.load(folder / TOKENS)
    train, held = (_rows_of(folder, name, tokens) for name in ("train", "eval"))
    questions = {name: np.load(folder / f"{name}.npy") for name in QUESTIONS}
    digest = record["card"]["digest"]
    return Prepared(train, held, record["card"], digest, record["highest"], record["ended"], **questions)


def _rows_of(folder: Path, name: str, tokens: Numbers) -> Rows[Any]:
    flips = folder / f"{name}.flips.npy"
    change = SwappedPairs(np.load(flips)) if flips.exists() else None
    return Rows(folder / ROWS, np.load(folder / f"{name}.npy"), tokens, change)
