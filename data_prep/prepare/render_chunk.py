"""One chunk of records to rendered rows and the facts that later decisions need. Runs in this process or in a worker.

A row is rendered before it is known on which side it stands, so nothing here depends on other chunks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.core.errors import UserError, at_row
from data_prep.options import LengthOptions, TrainOn
from data_prep.prepare.arrow_rows import RaggedColumn, flat_columns
from data_prep.quality.leakage import RecordTexts
from data_prep.rendering.renderer import Renderer
from data_prep.rendering.truncation import Shortener, TooLong, length_of, messages_of
from data_prep.splitting import SIDES, prompt_key, rank_bits
from data_prep.types import (
    CONVERSATION,
    DOCUMENT,
    Conversation,
    Labelled,
    LabelledTokens,
    Message,
    PairTokens,
    Preference,
    RowKind,
    Tokens,
)

ROW_STATS = np.dtype(
    [
        ("record", "<u4"),  # which record it was made of
        ("length", "<u4"),  # tokens that count for max_length
        ("tokens", "<u4"),  # tokens in all
        ("supervised", "<u4"),
        ("flip", "?"),  # swap both replies where the row trains
        ("ended", "?"),  # its end of turn is supervised
        ("digest", "<u8"),  # of what it says
    ]
)


@dataclass
class RenderedChunk:
    """What a chunk became. Arrays of records: `ranks` (uint64), `sides` asked for (uint8), `pieces` (uint32).

    `said` has what the records say, for the search for leaks (quality/leakage.py). `rows` are the rendered rows with
    their `facts` (ROW_STATS), whose `record` counts from the chunk's first record, and their columns of lists (`flat`).
    """

    ranks: npt.NDArray[np.uint64]
    sides: npt.NDArray[np.uint8]
    pieces: npt.NDArray[np.uint32]
    said: RecordTexts
    rows: Any
    facts: npt.NDArray[Any]
    flat: Mapping[str, RaggedColumn] = field(default_factory=dict)
    bad: list[tuple[int, UserError]] = field(default_factory=list)
    long: list[tuple[int, TooLong]] = field(default_factory=list)
    cut: list[tuple[int, str]] = field(default_factory=list)
    highest: int = -1
    """The highest token id."""
    choices: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Chunks:
    """Renders chunks of records of one kind.

    Args:
        kind: what they are.
        renderer: what renders them.
        length: how long a row may be.
        system: a system message for records that have none.
        train_on: which turns the loss of dialogues covers.
    """

    kind: RowKind
    renderer: Renderer
    length: LengthOptions
    system: str | None = None
    train_on: TrainOn = TrainOn.all

    def __call__(self, records: Sequence[Any]) -> RenderedChunk:
        """The rendered rows of one chunk."""
        if self.kind == DOCUMENT:
            return self._documents(records)
        records = [self._as_asked(record) for record in records]
        keys = [rank_bits(prompt_key(messages_of(record))) for record in records]
        part = _part(records, keys, [1] * len(records))
        rows, kept = [], []
        shortener = Shortener(self.renderer, self.length)
        for place, (record, row) in enumerate(zip(records, self.renderer.render(self.kind, records), strict=True)):
            cut = False
            if not isinstance(row, UserError) and length_of(row) > shortener.max_length:
                row = shortener.shorten(record, row)
                if isinstance(row, TooLong):
                    part.long.append((place, row))
                    continue
                cut = True
            problem = row if isinstance(row, UserError) else _problem(row, cut)
            if problem is not None:
                part.bad.append((place, problem))
                continue
            if cut:
                part.cut.append((place, record.id))
            rows.append(row)
            kept.append((place, bool(record.meta.get("flip"))))
        return self._filled(part, rows, kept)

    # ------------------------------------------------------------------ insides
    def _as_asked(self, record: Any) -> Any:
        record = _with_system(record, self.system)
        return _last_turn_alone(record) if self.train_on is TrainOn.last and self.kind == CONVERSATION else record

    def _documents(self, records: Sequence[Any]) -> RenderedChunk:
        """Documents cut into pieces of at most `max_length` tokens; a piece of one token has nothing to predict."""
        most = self.length.max_length
        encoded = self.renderer.documents([record.text for record in records])
        keys = [rank_bits(record.text.strip()) for record in records]
        part = _part(records, keys, [-(-len(ids) // most) for ids in encoded])
        rows, kept = [], []
        for place, (record, ids) in enumerate(zip(records, encoded, strict=True)):
            starts = range(0, len(ids), most)
            for start in starts:
                piece = ids[start : start + most]
                if len(piece) > 1:
                    identity = record.id if len(starts) == 1 else f"{record.id}#{start}"
                    task = record.meta.get("task")
                    rows.append(
                        Tokens(piece, [True] * len(piece), identity, task=task, features=record.meta.get("features"))
                    )
                    kept.append((place, False))
        return self._filled(part, rows, kept)

    def _filled(self, part: RenderedChunk, rows: list[Any], kept: list[tuple[int, bool]]) -> RenderedChunk:
        """The part with its rows and what is known of them."""
        part.rows, part.choices = rows, dict(self.renderer.choices)
        part.facts = facts = np.zeros(len(rows), dtype=ROW_STATS)
        part.flat = flat = flat_columns(rows)
        if not rows:
            return part
        ids = [one for name, one in flat.items() if name != "mask"]
        facts["record"], facts["flip"] = zip(*kept, strict=True)
        facts["length"] = [length_of(row) for row in rows]
        facts["tokens"] = sum(np.diff(one.ends) for one in ids)
        end = self.renderer.end_token_id
        if "mask" in flat:
            mask = flat["mask"]
            facts["supervised"] = mask.counts(mask.values)
            facts["ended"] = mask.counts(mask.values & (flat["ids"].values == end)) > 0
        else:
            facts["supervised"] = sum(np.diff(one.ends) for one in ids[1:])
            facts["ended"] = [_ended(row, end) for row in rows]
        facts["digest"] = [_digest(row, place, flat) for place, row in enumerate(rows)]
        part.highest = max(int(one.values.max(initial=-1)) for one in ids)
        return part


def _part(records: Sequence[Any], keys: list[int], pieces: list[int]) -> RenderedChunk:
    sides = np.array([SIDES.get(record.meta.get("split") or "", 0) for record in records], dtype=np.uint8)
    ranks = np.array(keys, dtype=np.uint64)
    return RenderedChunk(
        ranks, sides, np.array(pieces, dtype=np.uint32), RecordTexts.of(records), [], np.zeros(0, dtype=ROW_STATS)
    )


def _with_system(row: Any, system: str | None) -> Any:
    """The row with a system message in front, if one is asked for and the row has none."""
    name = "prompt" if isinstance(row, Preference | Labelled) else "messages"
    messages: tuple[Message, ...] = getattr(row, name)
    if not system or any(message.role == "system" for message in messages):
        return row
    return replace(row, **{name: (Message("system", system), *messages)})


def _last_turn_alone(row: Conversation) -> Conversation:
    """The dialogue with the loss on its last reply alone."""
    last = max(place for place, message in enumerate(row.messages) if message.role == "assistant")
    quiet = [m if place >= last else replace(m, train=False) for place, m in enumerate(row.messages)]
    return replace(row, messages=tuple(quiet))


def _problem(row: Any, cut: bool) -> UserError | None:
    """Why a rendered row cannot be trained on, if it cannot."""
    if isinstance(row, Tokens) and not any(islice(row.mask, 1, None)):
        return at_row(row.id, UserError("nothing to train on (no supervised token)", code="no_reply"))
    if isinstance(row, PairTokens) and row.chosen == row.rejected:
        how = "truncation" if cut else "rendering"
        return at_row(row.id, UserError(f"chosen and rejected are the same after {how}", code="identical_pair"))
    return None


def _ended(row: Any, end: int) -> bool:
    """Whether the replies of a row end with the end-of-turn token."""
    if isinstance(row, PairTokens):
        return row.chosen[-1:] == [end] == row.rejected[-1:]
    return isinstance(row, LabelledTokens) and row.reply[-1:] == [end]


def _digest(row: Any, place: int, flat: Mapping[str, RaggedColumn]) -> int:
    """What a row says, hashed: everything but the id and the meta data (paths differ between machines)."""
    total = hashlib.blake2b(digest_size=8)
    for name, one in flat.items():
        total.update(one.values[one.ends[place] : one.ends[place + 1]].data)
        if name != "mask":
            total.update(b"|")
    if isinstance(row, Tokens):
        if row.weights is not None:
            total.update(np.array(row.weights, dtype="<f8").tobytes())
    else:
        total.update(repr([getattr(row, name, None) for name in ("margin", "good", "text")]).encode("utf-8", "replace"))
    if row.features is not None:
        total.update(repr(row.features).encode("utf-8", "replace"))
    return int.from_bytes(total.digest(), "little")
