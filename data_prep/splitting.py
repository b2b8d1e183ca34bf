"""Which rows train and which evaluate. The same question never stands on both sides."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from data_prep.options import SourceOptions
from data_prep.types import Message

TRAIN, EVAL, OVERLAP, LEAK = 1, 2, 3, 4
SIDES = {"train": TRAIN, "eval": EVAL}
Ranks: TypeAlias = npt.NDArray[np.uint64]
Sides: TypeAlias = npt.NDArray[np.uint8]
Counts: TypeAlias = npt.NDArray[np.uint32]
_SPACE = re.compile(r"[\W_]+")


def prompt_key(messages: Sequence[Message]) -> str:
    """What makes two prompts the same question: the first user turn, lower case, words alone.

    A prompt without words (only signs) keeps its signs.
    """
    first = next((m.content for m in messages if m.role == "user"), messages[0].content if messages else "")
    return _SPACE.sub(" ", first.casefold()).strip() or first.strip()


def rank_bits(key: str) -> int:
    """64 bits of a hash of the question, which also stand for it: the same in every stage and for every seed."""
    digest = hashlib.sha256(f"align-split|{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def rank(key: str) -> float:
    """A number in [0, 1) from a hash of the question."""
    return rank_bits(key) / 2**64


def choose_sides(ranks: Ranks, wishes: Sides, rows: Counts, source: SourceOptions) -> tuple[Sides, str]:
    """The side of every record (TRAIN, EVAL, or OVERLAP: a training record whose question evaluates), and the rule.

    If any record asks to evaluate, the records' own wishes hold. Else questions whose rank is below `eval_share`
    evaluate, lowest first and whole groups of the same question: at most `eval_rows` rows, and at least one question
    unless it is the only one.

    Args:
        ranks: `rank_bits` of the questions, uint64.
        wishes: the side that each record asks for (0: none).
        rows: how many rows each record makes.
        source: has eval_share and eval_rows.
    """
    if (wishes == EVAL).any():
        sides = np.where(np.isin(ranks, ranks[wishes == EVAL]), OVERLAP, TRAIN).astype(np.uint8)
        sides[wishes == EVAL] = EVAL
        return sides, "the rows' own column split (or eval_path)"
    held: list[int] = []
    taken = 0
    if source.eval_share > 0 and source.eval_rows > 0 and (ranks != ranks[:1]).any():
        low = ranks < source.eval_share * 2.0**64  # the few that may evaluate
        low = low if low.any() else ranks == ranks.min()
        questions, which = np.unique(ranks[low], return_inverse=True)
        for question, count in zip(questions.tolist(), np.bincount(which, rows[low]).tolist(), strict=True):
            if taken + count <= source.eval_rows or not held:
                held.append(question)
                taken += int(count)
    rule = f"hash of the question (share {source.eval_share:g}, at most {source.eval_rows} rows)"
    return np.where(np.isin(ranks, np.array(held, dtype=np.uint64)), EVAL, TRAIN).astype(np.uint8), rule


def held_out_by_count(rows: Mapping[str, int], share: float) -> set[str]:
    """The questions that evaluate where this share of the rows is wanted: by rank, whole questions, as near as may be.

    A run holds out by `choose_sides`, whose rule gives a question the same side in every data set; for one file the
    share is kept instead. At least one question evaluates and one trains, where there are two.

    Args:
        rows: question -> its rows.
        share: of all rows, above 0 and below 1.
    """
    order, held = sorted(rows, key=rank_bits), set[str]()
    left = max(round(share * sum(rows.values())), 1)
    for question in order:
        if rows[question] <= left and len(held) + 1 < len(order):
            held.add(question)
            left -= rows[question]
    rest = [question for question in order if question not in held]
    if len(rest) > 1:  # every one of them is larger than what is left
        smallest = min(rest, key=lambda question: rows[question])
        if not held or rows[smallest] - left < left:
            held.add(smallest)
    return held
