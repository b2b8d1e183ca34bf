"""Rendered rows beyond what memory should hold: an Arrow file, mapped into memory, that is read like a list.

A row is rebuilt when it is asked for; what stays in memory is eight bytes a row, its place and its length.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from struct import pack
from typing import Any, Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt

from data_prep.types import LabelledTokens, PairTokens, PromptTokens, Tokens

T = TypeVar("T")
KINDS: dict[str, type] = {one.__name__: one for one in (Tokens, PairTokens, LabelledTokens, PromptTokens)}
_IDS, _FLAGS, _NUMBERS, _TEXT, _JSON, _VALUE = "ids", "flags", "numbers", "text", "json", "value"
_COLUMNS: dict[str, str] = {
    "ids": _IDS,
    "prompt": _IDS,
    "chosen": _IDS,
    "rejected": _IDS,
    "reply": _IDS,
    "mask": _FLAGS,
    "weights": _NUMBERS,
    "id": _TEXT,
    "task": _TEXT,
    "text": _TEXT,
    "margin": "number",
    "good": "flag",
    "meta": _JSON,
    "messages": _JSON,
    "features": _VALUE,
}


def _arrow_type(column: str) -> Any:
    import pyarrow as pa

    return {
        _IDS: pa.list_(pa.int32()),
        _FLAGS: pa.list_(pa.bool_()),
        _NUMBERS: pa.list_(pa.float64()),
        _TEXT: pa.string(),
        _JSON: pa.string(),
        _VALUE: pa.string(),
        "number": pa.float64(),
        "flag": pa.bool_(),
    }[_COLUMNS[column]]


def schema_of(kind: type) -> Any:
    """The Arrow schema of rows of a class; the class's name is in its metadata."""
    import pyarrow as pa

    names = [field.name for field in fields(kind)]
    return pa.schema([(name, _arrow_type(name)) for name in names], metadata={"row": kind.__name__})


@dataclass(frozen=True)
class RaggedColumn:
    """Lists of token ids (int32) or flags, one after another: list number n is `values[ends[n]:ends[n + 1]]`."""

    ends: npt.NDArray[np.int32]
    values: npt.NDArray[Any]

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]], column: str) -> RaggedColumn:
        """Lists that stand in such a column; packed by `struct`, as numpy and Arrow look at every number twice."""
        ends = np.cumsum([0, *map(len, lists)], dtype=np.int32)
        if _COLUMNS[column] == _FLAGS:
            return cls(ends, np.frombuffer(b"".join(map(bytes, lists)), dtype=np.bool_))
        packed = b"".join([pack(f"={len(one)}i", *one) for one in lists])
        return cls(ends, np.frombuffer(packed, dtype=np.int32))

    def arrow(self) -> Any:
        """The same as an Arrow array of lists."""
        import pyarrow as pa

        return pa.ListArray.from_arrays(arrow_array(self.ends), arrow_array(self.values))

    def counts(self, marked: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """How many values of each list are marked."""
        before: npt.NDArray[np.int64] = np.concatenate([[0], np.cumsum(marked, dtype=np.int64)])
        return before[self.ends[1:]] - before[self.ends[:-1]]


def flat_columns(rows: Sequence[Any]) -> dict[str, RaggedColumn]:
    """The columns of token ids and of flags of rows of one class, the ids first."""
    names = [field.name for field in fields(rows[0])] if rows else []
    kinds = [(kind, name) for kind in (_IDS, _FLAGS) for name in names if _COLUMNS[name] == kind]
    return {name: RaggedColumn.of([getattr(row, name) for row in rows], name) for _, name in kinds}


def to_batch(rows: Sequence[Any], flat: Mapping[str, RaggedColumn] | None = None) -> Any:
    """Rows of one class as an Arrow record batch; `flat` are their `flat_columns` where they are known."""
    import pyarrow as pa

    schema = schema_of(type(rows[0]))
    flat = flat_columns(rows) if flat is None else flat
    columns = []
    for field in schema:
        if field.name in flat:
            columns.append(flat[field.name].arrow())
            continue
        values = [getattr(row, field.name) for row in rows]
        if _COLUMNS[field.name] in (_JSON, _VALUE):
            values = [json.dumps(value) if value else None for value in values]
        if all(value is None for value in values):
            columns.append(pa.nulls(len(values), field.type))
        elif _COLUMNS[field.name] == _TEXT and None not in values:
            columns.append(text_array(values))
        else:
            columns.append(pa.array(values, field.type))
    return pa.record_batch(columns, schema=schema)


# pyarrow.array and Array.to_numpy import pandas, to see whether it has a say: 0.4 s in every process. These do not.
def arrow_array(values: npt.NDArray[Any]) -> Any:
    """Numbers or flags as an Arrow array."""
    import pyarrow as pa

    kind = pa.from_numpy_dtype(values.dtype)
    packed = np.packbits(values, bitorder="little") if values.dtype == np.bool_ else np.ascontiguousarray(values)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(packed)])


def numpy_array(column: Any) -> npt.NDArray[Any]:
    """The numbers of an Arrow array without nulls, where they lie."""
    kind = column.type.to_pandas_dtype()
    return np.frombuffer(column.buffers()[1], dtype=kind)[column.offset : column.offset + len(column)]


def text_array(texts: Sequence[str]) -> Any:
    """Texts as an Arrow array."""
    import pyarrow as pa

    encoded = [text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pa.StringArray.from_buffers(len(texts), pa.py_buffer(ends), pa.py_buffer(b"".join(encoded)))


class Rows(Sequence[T], Generic[T]):
    """Rows of an Arrow file in a given order; slices are lists.

    Args:
        path: an Arrow IPC file that `to_batch` filled.
        order: places of the rows in the file, uint32.
        tokens: how many token ids every row of the file holds, uint32.
        change: what is done to a row at such a place when it is read (None: nothing).
    """

    def __init__(
        self,
        path: Path,
        order: npt.NDArray[np.uint32],
        tokens: npt.NDArray[np.uint32],
        change: Callable[[int, T], T] | None = None,
    ) -> None:
        import pyarrow as pa

        self.path = path
        self.order = order
        self.tokens = tokens
        self.change = change
        self._file = pa.ipc.open_file(pa.memory_map(str(path)))
        self._kind = KINDS[self._file.schema.metadata[b"row"].decode()]
        counts = [self._file.get_batch(number).num_rows for number in range(self._file.num_record_batches)]
        self._starts = np.cumsum([0, *counts]).tolist()
        self._opened: dict[int, dict[str, Callable[[int], Any]]] = {}

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        if isinstance(place, slice):
            return [self._at(int(number)) for number in self.order[place]]
        return self._at(int(self.order[place]))

    def __iter__(self) -> Iterator[T]:
        for number in self.order:
            yield self._at(int(number))

    def __reduce__(self) -> Any:
        return Rows, (self.path, self.order, self.tokens, self.change)

    def lengths(self) -> npt.NDArray[np.int64]:
        """What `lengths_of` says of these rows; the file is not touched."""
        return self.tokens[self.order].astype(np.int64)

    def _at(self, number: int) -> T:
        batch = bisect_right(self._starts, number) - 1
        readers = self._opened.get(batch)
        if readers is None:
            held = self._file.get_batch(batch)
            readers = self._opened[batch] = {name: _reader(name, held.column(name)) for name in held.schema.names}
        place = number - self._starts[batch]
        row: T = self._kind(**{name: read(place) for name, read in readers.items()})
        return row if self.change is None else self.change(number, row)


class Joined(Sequence[T], Generic[T]):
    """Some rows, by their places, and further ones behind them; none is copied. Slices are lists."""

    def __init__(self, rows: Sequence[T], places: npt.NDArray[np.int64], more: Sequence[T]) -> None:
        self._rows = rows
        self._places = places
        self._more = more

    def __len__(self) -> int:
        return len(self._places) + len(self._more)

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        beyond = range(len(self))[place] - len(self._places)
        return self._more[beyond] if beyond >= 0 else self._rows[int(self._places[beyond])]

    def lengths(self) -> npt.NDArray[np.int64]:
        """What `lengths_of` says of these rows."""
        return np.concatenate([lengths_of(self._rows)[self._places], lengths_of(self._more)])


def lengths_of(rows: Sequence[Any]) -> npt.NDArray[np.int64]:
    """Token ids of every row, over all its sequences: what it takes in a packed batch."""
    if isinstance(rows, Rows | Joined):
        return rows.lengths()
    names = [field.name for field in fields(rows[0]) if _COLUMNS.get(field.name) == _IDS] if len(rows) else []
    return np.array([sum(len(getattr(row, name)) for name in names) for row in rows], dtype=np.int64)


def _reader(name: str, column: Any) -> Callable[[int], Any]:
    """What reads one value of a column."""
    kind = _COLUMNS[name]
    if kind == _JSON:
        return lambda place: json.loads(column[place].as_py() or "{}")
    if kind == _VALUE:
        return lambda place: json.loads(column[place].as_py() or "null")
    if kind not in (_IDS, _FLAGS):
        return lambda place: column[place].as_py()
    starts = numpy_array(column.offsets)
    if kind == _FLAGS:
        packed = np.frombuffer(column.values.buffers()[1], dtype=np.uint8)
        return lambda place: _flags(packed, int(starts[place]), int(starts[place + 1]))
    values = numpy_array(column.values)
    return lambda place: values[starts[place] : starts[place + 1]].tolist()


def _flags(packed: npt.NDArray[np.uint8], start: int, end: int) -> list[bool]:
    """Flags from `start` to `end` of what holds eight in a byte."""
    bits = np.unpackbits(packed[start // 8 : -(-end // 8)], bitorder="little")
    found: list[bool] = bits[start % 8 : start % 8 + end - start].view(np.bool_).tolist()
    return found
