"""Replies that a reward model must score below a good one, made of the good ones: token ids in, token ids out.

A reward model that scores such a reply as high as a good one is a reward that PPO will find: the policy needs no more
than to cut, repeat or mix what it says. Every probe is a pair (prompt, good reply, bad reply) made of held-out pairs
alone; no text is invented and nothing is drawn but by the row's place.
Source: the blind spots listed in "Scaling Laws for Reward Model Overoptimization" (arXiv 2210.10760) and measured in
"RewardBench" (arXiv 2403.13787) by kinds of pair; the kinds here need no labels. Cost: making them is free, scoring
them two passes per probe.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from data_prep.types import PairTokens

MOST = 256
"""Rows that are probed."""
Probe = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Prompt, good reply, bad reply."""

PROBES: dict[str, str] = {
    "off_topic": "the chosen reply of another prompt",
    "off_topic_over_rejected": "the chosen reply of another prompt, against the prompt's own rejected one",
    "truncated": "the first half of the reply, ended",
    "repeated": "the first half of the reply twice, ended",
    "shuffled": "the reply's tokens in another order, ended",
    "question_echoed": "the prompt's words instead of a reply, ended",
    "no_end": "the reply without its end",
}
"""Name of a probe -> the bad reply."""


def probes(rows: Sequence[PairTokens], end: int, control: Collection[int]) -> dict[str, list[Probe]]:
    """The probes of the first `MOST` rows, by name; a row that gives none of a kind is left out of it.

    Args:
        rows: held-out pairs; their sides end with the token `end`, or are left out where that is the point.
        end: id of the end token.
        control: ids that are no plain text, which an echo of the prompt leaves out.
    """
    rows = rows[:MOST]
    damaged: dict[str, Callable[[list[int], int], list[int]]] = {
        "truncated": lambda body, _: body[: len(body) // 2],
        "repeated": lambda body, _: body[: max(1, len(body) // 2)] * 2,
        "shuffled": _shuffled,
    }
    found: dict[str, list[Probe]] = {name: [] for name in PROBES}
    for place, row in enumerate(rows):
        body = [token for token in row.chosen if token != end]
        for name, damage in damaged.items():
            bad = damage(body, place)
            if bad and bad != body:
                found[name].append((row.prompt, row.chosen, [*bad, end]))
        echo = [token for token in row.prompt if token not in control][-max(8, len(body)) :]
        if echo and echo != body:
            found["question_echoed"].append((row.prompt, row.chosen, [*echo, end]))
        if body and len(body) < len(row.chosen):
            found["no_end"].append((row.prompt, row.chosen, body))
    for row, other in _elsewhere(rows):
        found["off_topic"].append((row.prompt, row.chosen, other))
        found["off_topic_over_rejected"].append((row.prompt, row.rejected, other))
    return {name: made for name, made in found.items() if made}


def _shuffled(body: list[int], place: int) -> list[int]:
    """The tokens in an order drawn from the row's place; backwards where that is the order they had."""
    drawn = [body[i] for i in np.random.default_rng(place).permutation(len(body))]
    return drawn if drawn != body else body[::-1]


def _elsewhere(rows: Sequence[PairTokens]) -> Iterator[tuple[PairTokens, list[int]]]:
    """Rows, each with the chosen reply of another prompt that is none of its own replies."""
    own: dict[tuple[int, ...], list[list[int]]] = {}
    for row in rows:
        own.setdefault(tuple(row.prompt), []).extend((row.chosen, row.rejected))
    half = len(rows) // 2
    for place, row in enumerate(rows):
        for step in range(len(rows)):
            other = rows[(place + half + step) % len(rows)]
            if other.prompt != row.prompt and other.chosen not in own[tuple(row.prompt)]:
                yield row, other.chosen
                break
