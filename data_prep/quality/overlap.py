"""Evaluation rows that are also training rows: the same row, the same question, or nearly the same words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.options import OnLeak
from data_prep.quality.near import NEAR, Hashes, NearIndex, similarity, word_pairs
from data_prep.quality.texts import question_key, question_text, row_digest, whole_text
from data_prep.types import Document

QUESTION_NEAR = 1 / 3
"""Least share of common word pairs of the questions of near rows: one reply may answer many questions."""
CHECKS = 5000
"""How many training rows a data card compares in full: rows that share most words with evaluation rows."""
NAMED = 20
"""How many leaks are named."""


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
        self.checks = 0
        """How many rows were compared in full."""
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
        self.checks += 1
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


def check_overlap(rows: Sequence[Any], sides: Sequence[str], on_leak: OnLeak) -> tuple[dict[str, Any], list[str]]:
    """The `overlap` of a data card, and the sides with "leak" in place of "overlap" for whole rows that repeat.

    Args:
        rows: records of all sides.
        sides: "train", "eval" or "overlap" (a training row whose question evaluates) of each.
        on_leak: what to do when a training row says the same as an evaluation row.

    Raises:
        UserError: there are such rows and `on_leak` is refuse; the first 20 are named.
    """
    held = HeldOut([row for row, side in zip(rows, sides, strict=True) if side == "eval"])
    leaks: list[tuple[str, str]] = []
    near: list[tuple[str, str]] = []
    result, looked = list(sides), 0
    for place, (row, side) in enumerate(zip(rows, sides, strict=True)):
        if side == "eval" or not held.rows:
            continue
        if (side == "overlap" or isinstance(row, Document)) and (other := held.same(row)):
            leaks.append((row.id, other))
            result[place] = "leak"
        elif side == "train" and held.checks < CHECKS:
            looked += 1
            if other := held.near(row):
                near.append((row.id, other))
    if leaks and on_leak is OnLeak.refuse:
        raise _leaked(leaks)
    card: dict[str, Any] = {"exact": len(leaks), "question": result.count("overlap"), "near": len(near)}
    if looked < result.count("train"):
        card["near_of"] = looked
    if near:
        card["near_rows"] = [f"{row} like {other}" for row, other in near[:3]]
    return {**card, "near_from": NEAR}, result


def _leaked(leaks: list[tuple[str, str]]) -> UserError:
    named = [f"{row} is {other}" for row, other in leaks]
    more = f", and {len(leaks) - 1} more" if len(leaks) > 1 else ""
    file, _, number = leaks[0][0].partition("#")[0].rpartition(":")
    return UserError(
        f"trains on what it evaluates: the same row as {leaks[0][1]}{more}",
        code="leak",
        hint="take such rows out, or set on_leak=drop to drop and count them in training",
        file=file or None,
        row=int(number) if number.isdigit() else None,
        details=named[:NAMED] if more else (),
    )
