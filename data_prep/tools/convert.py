"""Rows to other rows: converted to another format, rid of repetitions, split in two. One row after another.

What is written is read again, row by row, and must say the same; a row that the other format cannot say is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from data_prep.core.errors import UserError
from data_prep.filters.dedup import Dedup
from data_prep.formats.base import FORMATS, Format
from data_prep.quality.text_keys import question_key
from data_prep.records.stream import Given, Stream, open_any, open_stream
from data_prep.sources.rows import Row, Skip
from data_prep.sources.writers import RowWriter, check_new, row_writer
from data_prep.splitting import held_out_by_count
from data_prep.types import RowKind

SHOWN = 20


@dataclass
class Written:
    """What became of the rows: counts as in a data card, and the first rows that are not in the result."""

    stream: Stream
    removed: list[str] = field(default_factory=list)

    def rows(self) -> dict[str, Any]:
        """in, kept and dropped by reason; the sum is checked."""
        tally = self.stream.tally
        dropped = {reason: count for reason, count in sorted(tally.dropped.items()) if count}
        return {"in": tally.seen, "kept": tally.seen - sum(dropped.values()), "dropped": dropped}

    def drop(self, row: Row, reason: str, because: str) -> None:
        """Count a row that is left out, and name it while few are."""
        self.stream.tally.dropped[reason] += 1
        if len(self.removed) < SHOWN:
            self.removed.append(f"{row.id} {because}")


# ------------------------------------------------------------------------------------------------------------ convert
def writable() -> dict[str, str]:
    """Formats that can be written, and the kind of record that each of them holds."""
    return {name: form.writes for name, form in FORMATS.items() if form.writes}


def convert(given: Given, form: str, to: str) -> Written:
    """Write the records of a source as rows of another format.

    Raises:
        UserError: bad rows, rows that the format cannot say, a format that cannot be written, or an existing file.
    """
    check_new(to)
    if form not in writable():
        FORMATS.get(form)
        raise UserError(
            f"rows of the format {form} cannot be written", code="form", hint=f"choose of {', '.join(writable())}"
        )
    target = FORMATS.get(form)({}, 0)
    stream = open_stream(given, RowKind(target.writes), 0)
    result = Written(stream)
    with row_writer(to) as writer:
        for record in stream:
            try:
                writer.write(as_row(record, target))
            except UserError as problem:
                stream.tally.bad(problem)
        _check(stream)
    return result


def as_row(record: Any, target: Format) -> dict[str, Any]:
    """The row of a format that is read as this very record, ids aside.

    Raises:
        UserError: the format cannot say it; names the row.
    """
    file, _, number = record.id.partition("#")[0].rpartition(":")
    task = {"task": record.meta["task"]} if "task" in record.meta else {}
    row = Row(file, int(number) if number.isdigit() else 0, target.written(record) | task)
    again = list(target.records(RowKind(target.writes), [row]))
    if len(again) == 1 and _said(again[0]) == _said(record):
        return row.data
    why = f": {again[0].field or 'row'} {again[0].message}" if isinstance(again[0], UserError) else ""
    raise row.problem(None, f"cannot be said in the format {target.name} without loss{why}", code="not_the_same")


def _said(record: Any) -> Any:
    """What a record says, its task, and the side that it asks for."""
    if isinstance(record, Skip | UserError):
        return record
    return replace(record, id="", meta={key: record.meta[key] for key in ("split", "task") if key in record.meta})


# -------------------------------------------------------------------------------------------------------- row by row
def _each_row(given: Given, verb: str) -> tuple[Stream, Iterator[tuple[Row, Any]]]:
    """(the stream, pairs of a row and its first record) of a source whose rows stand for themselves.

    Raises:
        UserError: records of this format are made of several rows.
    """
    stream = open_any(given)
    if not stream.form.row_by_row(stream.kind):
        raise UserError(
            f"rows of the format {stream.form.name} belong together and cannot be taken apart",
            code="joined_rows",
            file=given.label,
            hint=f"align data convert first, then {verb} the result",
        )

    def pairs() -> Iterator[tuple[Row, Any]]:
        for row in stream.rows:
            stream.tally.seen += 1
            found = list(stream.form.records(stream.kind, [row]))
            bad = [record for record in found if isinstance(record, UserError)]
            records = [record for record in found if not isinstance(record, UserError | Skip)]
            if bad:
                stream.tally.bad(bad[0])
            elif records:
                yield row, records[0]
            else:
                stream.tally.dropped[next((r.reason for r in found if isinstance(r, Skip)), "nothing")] += 1
        _check(stream, verb == "dedup")  # a split asks for the question alone

    return stream, pairs()


def _check(stream: Stream, whole: bool = True) -> None:
    """Refuse bad rows; where records stand for their rows (`whole`), also those that leave out what matters."""
    stream.tally.check_whole()
    stream.tally.check_bad_rows(stream.given.source.on_bad_row)
    if whole:
        stream.check_left_out()


def dedup(given: Given, one: Dedup, to: str) -> Written:
    """Write the rows as they stand, without those that repeat an earlier one.

    Raises:
        UserError: bad rows, rows that belong together, or an existing file.
    """
    check_new(to)
    stream, pairs = _each_row(given, "dedup")
    result = Written(stream)
    with row_writer(to) as writer:
        for row, record in pairs:
            kept = one.step(record)
            if isinstance(kept, Skip):
                result.drop(row, kept.reason, f"repeats {one.repeats}")
            else:
                writer.write(row.data)
    return result


# ------------------------------------------------------------------------------------------------------------- split
@dataclass
class Sides:
    """Rows in two files, and how many of each value of the stratum stand on which side."""

    written: Written
    counts: dict[str, int]
    strata: dict[str, dict[str, int]]


def split(given: Given, share: float, by: str | None, to: dict[str, str]) -> Sides:
    """Write the rows as they stand into two files, questions apart.

    Args:
        given: the source.
        share: share of the rows that evaluate, as near as whole questions allow.
        by: a column; each of its values gives this share of its rows, at least one question where it has two.
        to: "train" and "eval": the files.

    Raises:
        UserError: bad rows, rows that say their side themselves or belong together, or an existing file.
    """
    for path in to.values():
        check_new(path)
    sides = _sides_of(given, share, by)
    stream, pairs = _each_row(given, "split")
    result = Sides(Written(stream), dict.fromkeys(to, 0), {})
    with row_writer(to["train"]) as train, row_writer(to["eval"]) as held:
        writers: dict[str, RowWriter] = {"train": train, "eval": held}
        for row, record in pairs:
            side = sides[question_key(record)]
            writers[side].write(row.data)
            result.counts[side] += 1
            if by is not None:
                counts = result.strata.setdefault(_stratum(row, by), dict.fromkeys(to, 0))
                counts[side] += 1
    return result


def _sides_of(given: Given, share: float, by: str | None) -> dict[str, str]:
    """Question -> side. A question belongs to the value of the column that stands in its first row."""
    strata: dict[str, dict[str, int]] = {}
    home: dict[str, str] = {}
    for row, record in _each_row(given, "split")[1]:
        if record.meta.get("split"):
            raise row.problem("split", "says which side the row is on (expected rows without it)", code="has_split")
        key = question_key(record)
        stratum = home.setdefault(key, _stratum(row, by) if by is not None else "")
        counts = strata.setdefault(stratum, {})
        counts[key] = counts.get(key, 0) + 1
    held = {question for counts in strata.values() for question in held_out_by_count(counts, share)}
    return {question: "eval" if question in held else "train" for question in home}


def _stratum(row: Row, by: str) -> str:
    if by not in row.data:
        raise row.problem(by, "is missing (expected the column to split by)")
    return str(row.data[by])
