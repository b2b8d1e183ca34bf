"""Evaluation rows that are also training rows: the same row, the same question, or nearly the same words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.core.errors import UserError
from data_prep.quality.minhash import NEAR, Hashes, NearIndex, pairs_of_hashes, similarity, word_hashes, word_pairs
from data_prep.quality.text_keys import question_key, question_text, row_digest, texts_apart, whole_text
from data_prep.splitting import EVAL, LEAK, OVERLAP, TRAIN, Sides

CHECKS = 5000
"""How many training rows a data card compares in full: rows that share most words with evaluation rows."""
QUESTION_NEAR = 1 / 3
"""Least share of common word pairs of the questions of near rows: one reply may answer many questions."""
NAMED = 20
"""How many leaks are named."""
_BITS = np.uint64(1 << 24)  # a table of the evaluation rows' word pairs, so that few training rows are looked up


class HeldOut:
    """Evaluation rows, asked whether a training row repeats one of them.

    Args:
        rows: the evaluation rows.
        threshold: least similarity of near repetitions.
    """

    def __init__(self, rows: Sequence[Any], threshold: float = NEAR) -> None:
        self.rows, self.questions = dict[bytes, str](), dict[str, str]()
        self._index = NearIndex(threshold)
        self._asked: list[Hashes] = []
        self._loose: set[tuple[str, str]] = set()
        texts: list[Hashes] = []
        for row in rows:
            self.rows.setdefault(row_digest(row), row.id)
            self.questions.setdefault(question_key(row), row.id)
            texts.append(word_pairs(whole_text(row)))
            self._index.add(texts[-1], (len(self._asked), row.id))
            self._asked.append(word_pairs(question_text(row)))
            self._loose |= _loose(whole_text(row))
        self._pairs = np.unique(np.concatenate(texts)) if texts else np.empty(0, dtype=np.uint64)

    def same(self, row: Any) -> str | None:
        """The id of the evaluation row that says the same, or None."""
        return self.rows.get(row_digest(row))

    def asks_same(self, row: Any) -> str | None:
        """The id of an evaluation row with the same question, or None."""
        return self.questions.get(question_key(row))

    def near(self, row: Any) -> str | None:
        """The id of an evaluation row that says nearly the same, to a question that is not another one, or None."""
        text = whole_text(row)
        loose = _loose(text)
        if len(loose) >= 3 and len(loose & self._loose) < len(loose) * self._index.threshold / 2:
            return None  # cheap, and most rows end here
        pairs = word_pairs(text)
        if not len(pairs) or not len(self._pairs):
            return None
        places = np.searchsorted(self._pairs, pairs)
        places[places == len(self._pairs)] = 0
        if (self._pairs[places] == pairs).mean() < self._index.threshold:  # Jaccard is at most this share
            return None
        asked: Hashes | None = None
        for place, name in self._index.similar(pairs):
            asked = word_pairs(question_text(row)) if asked is None else asked
            if not len(asked) or similarity(asked, self._asked[place]) >= QUESTION_NEAR:
                return str(name)
        return None


def _loose(text: str) -> set[tuple[str, str]]:
    """Pairs of neighbours between spaces, signs included; too few to tell where a script has no spaces."""
    listed = text.lower().split()
    return set(pairwise(listed))


@dataclass
class RecordTexts:
    """What some records say, compactly: `ids`, `digests` (uint64, equal for the same row), the word pairs of all, one
    after another, how many each record has (`counts`), and how many of them are its question's (`asked`).
    """

    ids: Sequence[str]
    digests: npt.NDArray[np.uint64]
    pairs: Hashes
    counts: npt.NDArray[np.uint32]
    asked: npt.NDArray[np.uint32]

    @classmethod
    def of(cls, records: Sequence[Any]) -> RecordTexts:
        """What these records say."""
        apart = [texts_apart(record) for record in records]
        hashed, lengths = word_hashes([text for asked, rest in apart for text in (*asked, *rest)])
        before = np.concatenate([[0], np.cumsum(lengths)])  # words before each text
        first = np.cumsum([0, *(len(asked) + len(rest) for asked, rest in apart)])  # texts before each record
        pairs, counts = pairs_of_hashes(hashed, np.diff(before[first]))
        known = before[first[:-1] + [len(asked) for asked, _ in apart]] - before[first[:-1]]
        known = np.where(known > 1, known - 1, known)  # of one word: its pair with the next stands for it
        digests = [int.from_bytes(row_digest(record)[:8], "little") for record in records]
        ids = [record.id for record in records]
        asked = np.minimum(known, counts).astype(np.uint32)
        return cls(ids, np.array(digests, dtype=np.uint64), pairs, counts, asked)

    def pairs_of(self, place: int) -> Hashes:
        """The word pairs of one record, those of its question first."""
        end = int(self.counts[: place + 1].sum())
        return self.pairs[end - int(self.counts[place]) : end]

    def question_of(self, place: int) -> Hashes:
        """The word pairs of one record's question."""
        return self.pairs_of(place)[: int(self.asked[place])]


def check_overlap(
    said: Callable[[], Iterable[RecordTexts]], sides: Sides, refusing: str | None, documents: bool = False
) -> tuple[dict[str, Any], Sides]:
    """The `overlap` of a data card, and the sides with LEAK for whole rows that repeat.

    Args:
        said: gives what all records say, in order; called twice.
        sides: TRAIN, EVAL or OVERLAP (a training row whose question evaluates) of each record.
        refusing: the option by which a training row that says the same as an evaluation row is refused; None: it is
            dropped and counted.
        documents: the records are documents, which are their own question.

    Raises:
        UserError: there are such rows and they are not to be dropped; the first 20 are named.
    """
    result = sides.copy()
    held: dict[int, str] = {}
    index, seen = NearIndex(NEAR), np.zeros(_BITS, dtype=bool)
    for start, part in _numbered(said):
        for place in np.flatnonzero(sides[start : start + len(part.ids)] == EVAL).tolist():
            held.setdefault(int(part.digests[place]), part.ids[place])
            pairs = part.pairs_of(place)
            index.add(pairs, (part.question_of(place).copy(), part.ids[place]))
            seen[pairs % _BITS] = True
    known = np.array(list(held), dtype=np.uint64)
    leaks: list[tuple[str, str]] = []
    near: list[tuple[str, str]] = []
    left, looked = CHECKS, 0
    for start, part in _numbered(said) if held else ():
        own = sides[start : start + len(part.ids)]
        same = (own != EVAL) & (documents | (own == OVERLAP)) & np.isin(part.digests, known)
        result[start : start + len(own)][same] = LEAK
        leaks += [(part.ids[place], held[int(part.digests[place])]) for place in np.flatnonzero(same).tolist()]
        candidates = np.flatnonzero((own == TRAIN) & ~same & _alike(part, seen))[:left]
        left -= len(candidates)
        if left or len(candidates):
            looked += int((own[: None if left else candidates[-1] + 1] == TRAIN).sum())
        for place in candidates.tolist():
            if (other := _near(part, place, index)) is not None:
                near.append((part.ids[place], other))
    if leaks and refusing:
        raise _leaked(leaks, refusing)
    card: dict[str, Any] = {"exact": len(leaks), "question": int((result == OVERLAP).sum()), "near": len(near)}
    if held and looked < int((result == TRAIN).sum()):
        card["near_of"] = looked
    if near:
        card["near_rows"] = [f"{row} like {other}" for row, other in near[:3]]
    return {**card, "near_from": NEAR}, result


def _near(part: RecordTexts, place: int, index: NearIndex) -> str | None:
    """The id of an evaluation row that says nearly the same, to a question that is not another one, or None."""
    asked = part.question_of(place)
    for other, name in index.similar(part.pairs_of(place)):
        if not len(asked) or similarity(asked, other) >= QUESTION_NEAR:
            return str(name)
    return None


def _numbered(said: Callable[[], Iterable[RecordTexts]]) -> Iterator[tuple[int, RecordTexts]]:
    """(number of the first record, what the records say)."""
    start = 0
    for part in said():
        yield start, part
        start += len(part.ids)


def _alike(part: RecordTexts, seen: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which records may be near an evaluation row: a share of their pairs that bounds the similarity is known."""
    known = np.concatenate([[0], np.cumsum(seen[part.pairs % _BITS])])
    ends = np.cumsum(part.counts, dtype=np.int64)
    share = (known[ends] - known[ends - part.counts]) / np.maximum(part.counts, 1)
    alike: npt.NDArray[np.bool_] = share >= NEAR
    return alike


def _leaked(leaks: list[tuple[str, str]], option: str) -> UserError:
    named = [f"{row} is {other}" for row, other in leaks]
    more = f", and {len(leaks) - 1} more" if len(leaks) > 1 else ""
    file, _, number = leaks[0][0].partition("#")[0].rpartition(":")
    return UserError(
        f"trains on what it evaluates: the same row as {leaks[0][1]}{more}",
        code="leak",
        hint=f"take such rows out, or set {option}=drop to drop and count them in training",
        file=file or None,
        row=int(number) if number.isdigit() else None,
        details=named[:NAMED] if more else (),
    )
