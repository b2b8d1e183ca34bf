"""Rendered chunks put together: a list while there are few rows, an Arrow file from `MANY` on, facts as arrays.

What stays in memory of a row that went to the file is its facts (about 40 bytes).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from data_prep.core.errors import UserError
from data_prep.prepare.arrow_rows import RaggedColumn, Rows, arrow_array, numpy_array, schema_of, text_array, to_batch
from data_prep.prepare.render_chunk import ROW_STATS, RenderedChunk
from data_prep.prepare.workers import CHUNK
from data_prep.quality.leakage import RecordTexts
from data_prep.rendering.truncation import TooLong
from data_prep.types import LabelledTokens, PairTokens

T = TypeVar("T")
_SHOWN = 2000  # problems that are kept to be shown
ROWS, SAID = "rows.arrow", "said.arrow"


@contextmanager
def writing(folder: Callable[[], Path | None]) -> Iterator[None]:
    """Where rows are written into a folder: says what can be done when that is not possible.

    Raises:
        UserError: the disk is full, or gone.
    """
    try:
        yield
    except OSError as problem:
        raise UserError(
            f"rows cannot be written ({problem.strerror or problem})",
            code="cannot_write",
            file=str(folder() or "") or None,
            hint="make room, or name a folder that has some with ALIGN_CACHE",
        ) from problem


class CollectedRows:
    """Everything that the chunks of all sources became.

    Args:
        folder: gives the folder for files; called when they are first needed.

    Attributes:
        records: how many records there are.
        long, cut: (record, what is known of it) of rows that were too long, or were cut.
        highest: the highest token id.
    """

    def __init__(self, folder: Callable[[], Path]) -> None:
        self._folder = folder
        self.folder: Path | None = None
        self.records = 0
        self.long: list[tuple[int, TooLong]] = []
        self.cut: list[tuple[int, str]] = []
        self.highest = -1
        self.choices: dict[str, str] = {}
        self._problems: list[tuple[int, UserError]] = []
        self._bad: dict[str, list[int]] = {}
        self._rows: list[Any] = []
        self._said: list[RecordTexts] = []
        self._facts: list[npt.NDArray[Any]] = []
        self._ranks: list[npt.NDArray[np.uint64]] = []
        self._sides: list[npt.NDArray[np.uint8]] = []
        self._pieces: list[npt.NDArray[np.uint32]] = []
        self._files: list[Any] = []
        self._writers: list[Any] = []

    def add(self, part: RenderedChunk) -> None:
        """Take in what one chunk became."""
        first = self.records
        self.records += len(part.ranks)
        part.facts["record"] += first
        self._facts.append(part.facts)
        self._ranks.append(part.ranks)
        self._sides.append(part.sides)
        self._pieces.append(part.pieces)
        self.long += [(first + place, row) for place, row in part.long]
        self.cut += [(first + place, name) for place, name in part.cut]
        self.highest = max(self.highest, part.highest)
        self.choices |= part.choices
        for place, problem in part.bad:
            self._bad.setdefault(problem.code, []).append(first + place)
            if len(self._problems) < _SHOWN:
                self._problems.append((first + place, problem))
        if self.folder is None and isinstance(part.rows, list):
            self._rows += part.rows
            self._said.append(part.said)
            return
        with writing(lambda: self.folder):
            if self.folder is None:
                self._open(part.rows.schema, part.said)
            self._write(part.rows, part.said)

    def _open(self, schema: Any, said: RecordTexts) -> None:
        """Begin the files, for rows of this schema and texts like these, with what was gathered so far."""
        import pyarrow as pa

        self.folder = self._folder()
        for name, kind in ((ROWS, schema), (SAID, _said_batch([said]).schema)):
            self._files.append(pa.OSFile(str(self.folder / name), "wb"))
            self._writers.append(pa.ipc.new_file(self._files[-1], kind))
        for start in range(0, len(self._rows), CHUNK):
            self._writers[0].write_batch(to_batch(self._rows[start : start + CHUNK]))
        for said in self._said:
            self._writers[1].write_batch(_said_batch([said]))
        self._rows, self._said = [], []

    def _write(self, rows: Any, said: RecordTexts) -> None:
        batch = to_batch(rows) if isinstance(rows, list) and rows else rows
        if not isinstance(batch, list):
            self._writers[0].write_batch(batch)
        self._writers[1].write_batch(_said_batch([said]))

    def close(self, on_disk: bool = False) -> None:
        """Finish the files; `on_disk`: few rows have some, too."""
        with writing(lambda: self.folder):
            if on_disk and self._rows:
                self._open(schema_of(type(self._rows[0])), self._said[0])
            for each in (*self._writers, *self._files):
                each.close()
        self._writers, self._files = [], []

    def abandon(self) -> None:
        """Let go of files that will not be finished."""
        for each in (*self._writers, *self._files):
            with suppress(OSError):  # a full disk has no room for their last bytes either
                each.close()
        self._writers, self._files = [], []

    def said(self) -> Iterator[RecordTexts]:
        """What all records say, in order."""
        if self.folder is None:
            yield from self._said
            return
        import pyarrow as pa

        with pa.memory_map(str(self.folder / SAID)) as file:
            reader = pa.ipc.open_file(file)
            for number in range(reader.num_record_batches):
                yield _said_of(reader.get_batch(number))

    def records_of(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8], npt.NDArray[np.uint32]]:
        """(ranks of the questions, sides asked for, pieces) of all records."""
        none: list[Any] = [np.zeros(0)]
        found = (self._ranks or none, self._sides or none, self._pieces or none)
        self._ranks, self._sides, self._pieces = [], [], []
        ranks, sides, pieces = (np.concatenate(each) for each in found)
        return ranks.astype(np.uint64), sides.astype(np.uint8), pieces.astype(np.uint32)

    def facts(self) -> npt.NDArray[Any]:
        """The facts of all rows (chunks.FACTS)."""
        self._facts = [np.concatenate([np.zeros(0, dtype=ROW_STATS), *self._facts])]
        return self._facts[0]

    def bad(self, counts: npt.NDArray[np.bool_]) -> tuple[Counter[str], list[UserError]]:
        """Bad records among those that count: their number by code, and the first problems."""
        numbers = Counter({code: int(counts[places].sum()) for code, places in self._bad.items()})
        return numbers, [problem for place, problem in self._problems if counts[place]]

    def rows(self, order: npt.NDArray[np.uint32], change: Callable[[int, Any], Any] | None) -> Any:
        """The rows in an order; `change` is done to a row (given its number) when it is read."""
        if self.folder is not None:
            return Rows(self.folder / ROWS, order, self.facts()["tokens"], change)
        return [self._rows[n] if change is None else change(n, self._rows[n]) for n in order.tolist()]


class SwappedPairs:
    """Swaps both replies of the pairs with these numbers; a labelled reply gets the other label.

    Args:
        numbers: sorted numbers of rows, uint32.
    """

    def __init__(self, numbers: npt.NDArray[np.uint32]) -> None:
        self.numbers = numbers

    def __call__(self, number: int, row: Any) -> Any:
        """The row, flipped if it is one of them."""
        place = int(np.searchsorted(self.numbers, number))
        if not (place < len(self.numbers) and self.numbers[place] == number):
            return row
        if isinstance(row, LabelledTokens):
            return replace(row, good=not row.good)
        if not isinstance(row, PairTokens):
            return row
        margin = None if row.margin is None else -row.margin
        return PairTokens(row.prompt, row.rejected, row.chosen, row.id, margin, row.task, row.features)


def _said_batch(said: list[RecordTexts]) -> Any:
    import pyarrow as pa

    (one,) = said
    pairs = RaggedColumn(np.concatenate([[0], np.cumsum(one.counts)]).astype(np.int32), one.pairs)
    columns = [text_array(one.ids), arrow_array(one.digests), pairs.arrow(), arrow_array(one.asked)]
    return pa.record_batch(columns, ["id", "digest", "pairs", "asked"])


def _said_of(batch: Any) -> RecordTexts:
    pairs = batch.column("pairs")
    counts = np.diff(numpy_array(pairs.offsets)).astype(np.uint32)
    columns = [numpy_array(one) for one in (batch.column("digest"), pairs.values, batch.column("asked"))]
    return RecordTexts(_Texts(batch.column("id")), columns[0], columns[1], counts, columns[2])


class _Texts(Sequence[str]):
    """The texts of an Arrow array, read one by one: few are asked for."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, place: Any) -> Any:
        return self._column[place].as_py()
