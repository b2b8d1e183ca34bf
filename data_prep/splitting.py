"""Which rows train and which evaluate. The same question never stands on both sides."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.options import SourceOptions
from data_prep.types import Message

_SPACE = re.compile(r"[\W_]+")


def prompt_key(messages: Sequence[Message]) -> str:
    """What makes two prompts the same question: the first user turn, lower case, words alone.

    A prompt without words (only signs) keeps its signs.
    """
    first = next((m.content for m in messages if m.role == "user"), messages[0].content if messages else "")
    return _SPACE.sub(" ", first.casefold()).strip() or first.strip()


def rank(key: str) -> float:
    """A number in [0, 1) from a hash of the question: the same in every stage and for every seed."""
    digest = hashlib.sha256(f"align-split|{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@dataclass(frozen=True)
class Candidate:
    """A row for the split: its question, the side it asks for ("train", "eval" or None), and how many rows it makes."""

    key: str
    side: str | None
    weight: int = 1


def choose_sides(rows: Sequence[Candidate], source: SourceOptions) -> tuple[list[str], str]:
    """The side of every row, "train", "eval" or "overlap" (a training row whose question evaluates), and the rule.

    If any row asks to evaluate, the rows' own wishes hold. Else questions whose rank is below `eval_share` evaluate,
    lowest first and whole groups of the same question: at most `eval_rows` rows, and at least one question unless it
    is the only one.
    """
    if any(row.side == "eval" for row in rows):
        held_keys = {row.key for row in rows if row.side == "eval"}
        sides = ["eval" if r.side == "eval" else "overlap" if r.key in held_keys else "train" for r in rows]
        return sides, "the rows' own column split (or eval_path)"
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.key] = counts.get(row.key, 0) + row.weight
    ranked = sorted(counts, key=lambda key: (rank(key), key))
    held: set[str] = set()
    taken = 0
    if source.eval_share > 0 and source.eval_rows > 0 and len(ranked) > 1:
        for key in ranked:
            if held and rank(key) >= source.eval_share:
                break
            if taken + counts[key] <= source.eval_rows or not held:
                held.add(key)
                taken += counts[key]
    rule = f"hash of the question (share {source.eval_share:g}, at most {source.eval_rows} rows)"
    return ["eval" if row.key in held else "train" for row in rows], rule


def in_order(rows: Sequence[Candidate], sides: Sequence[str]) -> list[int]:
    """Places of the rows: those that train as they stand, then those that evaluate by the rank of their question."""
    held = [place for place, side in enumerate(sides) if side == "eval"]
    held.sort(key=lambda place: rank(rows[place].key))
    return [place for place, side in enumerate(sides) if side != "eval"] + held
