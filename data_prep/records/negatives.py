"""Further preference pairs made of the given ones: what a reward model must reject beside the other style.

Pairs that only say which of two styles is better teach style alone: a reward model trained on them takes the right
style to the wrong question for a good reply, and so does PPO after it. Every pair here has its row's own prompt, and a
rejected side that no one wrote for it: another row's reply, or a row's reply cut, repeated or out of order. No text is
invented. Every draw is a hash of the seed and of what the row says, so it does not depend on paths or the order of
rows; a row's negatives stand on its side, and are made of rows of that side alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from data_prep.core.errors import UserError, unknown
from data_prep.core.hashing import draw
from data_prep.formats.corruption import Draw, repeated, shuffled, truncated
from data_prep.options import SourceOptions
from data_prep.quality.text_keys import question_key
from data_prep.splitting import EVAL, SIDES, TRAIN, choose_sides, rank_bits
from data_prep.types import Preference

KINDS: Mapping[str, str] = {
    "off_topic": "the row's rejected reply over the chosen reply of another topic: the topic counts before the style",
    "same_style_off_topic": "the chosen reply over the chosen reply of another topic: the topic alone differs",
    "truncated": "the chosen reply over its beginning",
    "repeated": "the chosen reply over itself with a word said several times",
    "shuffled": "the chosen reply over its words in another order",
}
"""Kind of negative -> the pair that it makes."""
_DAMAGES: Mapping[str, Callable[[list[str], str, Draw], str]] = {
    "truncated": truncated,
    "repeated": repeated,
    "shuffled": shuffled,
}
_TRIES = 50
MOST = 100
"""Pairs of one kind that a row may give."""


def negatives_of(source: SourceOptions, where: str = "data.preferences.") -> dict[str, float]:
    """Kind -> pairs per row, as `negatives` says: kinds (one pair a row each), or {kind: pairs per row}.

    Raises:
        UserError: an unknown kind, or a number that is none.
    """
    path, shares = f"{where}negatives", dict[str, float]()
    for each in source.negatives:
        for kind, share in (each if isinstance(each, Mapping) else {str(each): 1.0}).items():
            if kind not in KINDS:
                problem = unknown("kind of negatives", str(kind), KINDS)
                problem.field = path
                raise problem
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= MOST:
                raise UserError(
                    f"wrong number of pairs per row for {kind} (got {share!r}; expected a number from 0 to {MOST})",
                    field=path,
                    code="bad_value",
                )
            shares[str(kind)] = shares.get(str(kind), 0.0) + share
    return {kind: share for kind, share in shares.items() if share}


@dataclass
class Negatives:
    """Adds negatives to the pairs of one source.

    Args:
        shares: kind -> pairs per row; of a fraction a row draws whether it gets one.
        source: the source's options, which say what is held out.
        seed: decides the draws.
    """

    shares: Mapping[str, float]
    source: SourceOptions
    seed: int
    rule: str = ""
    """How the sides were chosen."""
    rows: int = 0
    made: Counter[str] = field(default_factory=Counter)
    impossible: Counter[str] = field(default_factory=Counter)

    def through(self, pairs: Iterable[Preference]) -> Iterator[Preference]:
        """All pairs, which are held in memory, then their negatives."""
        every = list(pairs)
        sides = self._mark(every)
        yield from every
        for side in (TRAIN, EVAL):
            own = [pair for pair, stands in zip(every, sides, strict=True) if stands == side]
            self.rows += len(own)
            yield from self._of_side(_Pool.of(own, self.seed))

    def card(self) -> dict[str, Any]:
        """What the data card says: pairs of each kind, their share of all, rows that could not give one."""
        total = self.rows + sum(self.made.values())
        return {
            kind: {"per_row": share, "pairs": self.made[kind], "share": round(self.made[kind] / max(1, total), 4)}
            | ({"impossible": self.impossible[kind]} if self.impossible[kind] else {})
            for kind, share in self.shares.items()
        }

    def _mark(self, pairs: Sequence[Preference]) -> Any:
        """The side of every pair, chosen before there are negatives and written down where it decides."""
        ranks = np.array([rank_bits(question_key(pair)) for pair in pairs], dtype=np.uint64)
        wishes = np.array([SIDES.get(pair.meta.get("split") or "", 0) for pair in pairs], dtype=np.uint8)
        sides, self.rule = choose_sides(ranks, wishes, np.ones(len(pairs), dtype=np.uint32), self.source)
        for pair, side in zip(pairs, sides, strict=True):
            pair.meta["split"] = "eval" if side == EVAL else "train"
        return sides

    def _of_side(self, pool: _Pool) -> Iterator[Preference]:
        for pair in pool.pairs:
            said = (question_key(pair), pair.chosen, pair.rejected)
            for kind, share in self.shares.items():
                times = int(share) + (draw("times", kind, self.seed, *said) < share - int(share))
                for number in range(times):
                    key = (kind, self.seed, number, *said)
                    chosen, rejected = _sides_of(kind, pair, pool, key)
                    if rejected is None:
                        self.impossible[kind] += 1
                        continue
                    self.made[kind] += 1
                    meta = {name: value for name, value in pair.meta.items() if name != "flip"} | {"task": kind}
                    yield replace(
                        pair,
                        chosen=chosen,
                        rejected=rejected,
                        id=f"{pair.id}#{kind}{number}",
                        margin=None,
                        meta=meta,
                    )


def _sides_of(kind: str, pair: Preference, pool: _Pool, key: tuple[object, ...]) -> tuple[str, str | None]:
    """(the better reply, the worse one) of a negative; None where the row gives none."""
    if kind in _DAMAGES:
        return pair.chosen, _damaged(kind, pair, pool, key)
    chosen = pair.rejected if kind == "off_topic" else pair.chosen
    return chosen, pool.elsewhere(pair, key)


def _damaged(kind: str, pair: Preference, pool: _Pool, key: tuple[object, ...]) -> str | None:
    """The chosen reply, damaged, unless that is a reply that a row gives."""
    words = pair.chosen.split()
    joined = " " if len(words) > 1 else ""
    words = words if joined else list(pair.chosen.strip())
    for attempt in range(_TRIES if len(words) > 1 else 0):
        said = _DAMAGES[kind](words, "", lambda *more, attempt=attempt: draw(attempt, *more, *key))
        said = said if joined else said.replace(" ", "")
        if folded(said) not in pool.replies and folded(said) != folded(pair.rejected):
            return said
    return None


def folded(text: str) -> str:
    """A text with its white space folded."""
    return " ".join(text.split())


@dataclass
class _Pool:
    """The pairs of one side, their topics, and every reply that they give."""

    pairs: list[Preference]
    topics: list[str]
    numbers: dict[str, list[int]]
    known: dict[str, set[str]]
    """Topic -> the replies, chosen or rejected, that its rows give."""
    replies: set[str]

    @classmethod
    def of(cls, pairs: list[Preference], seed: int) -> _Pool:
        """The pool of these pairs; a pair without a topic has its question as one."""
        numbers: dict[str, list[int]] = {}
        known: dict[str, set[str]] = {}
        for number, pair in enumerate(pairs):
            topic = _topic(pair)
            numbers.setdefault(topic, []).append(number)
            known.setdefault(topic, set()).update((folded(pair.chosen), folded(pair.rejected)))
        for own in numbers.values():  # whatever order they were read in
            own.sort(key=lambda number: (question_key(pairs[number]), pairs[number].chosen, pairs[number].rejected))
        replies = set().union(*known.values()) if known else set()
        return cls(pairs, sorted(numbers), numbers, known, replies)

    def elsewhere(self, pair: Preference, key: tuple[object, ...]) -> str | None:
        """The chosen reply of another topic, which no row of this topic gives."""
        own = _topic(pair)
        for attempt in range(_TRIES if len(self.topics) > 1 else 0):
            topic = self.topics[int(draw("topic", attempt, *key) * len(self.topics))]
            there = self.numbers[topic]
            text = self.pairs[there[int(draw("row", attempt, *key) * len(there))]].chosen
            if topic != own and folded(text) not in self.known[own]:
                return text
        return None


def _topic(pair: Preference) -> str:
    return str(pair.meta.get("topic") or question_key(pair))
