"""What a data card counts that deserves a second look: for `align check` before a run and the report after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from data_prep.quality.missing_words import missing_replies
from data_prep.types import PROMPT, RowKind

FEW = 30
"""Held-out rows below which a held-out number says little; said where there are rows enough to hold out more."""
REVERSED, LEAST = 0.35, 3
"""Rows against the usual order of their two answers: with more of a share there is no usual order, and so few say
nothing."""

_LENT = "where data.prompts names no file: of data.conversations, else of data.preferences, which they are taken from"
"""Whose options are read for prompts that have no source of their own."""


def card_warnings(card: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(code, message, hint) of everything in a card that is worth a second look.

    Generated rows repeat each other, and some have labels flipped, by design.
    """
    overlap, pairs, splits = (_part(card, name) for name in ("overlap", "pairs", "splits"))
    kind = card.get("kind")
    where = f"data.{RowKind(kind).option if kind in list(RowKind) else 'NAME'}"
    generated = str(card.get("source") or "").startswith("generator ")
    if overlap.get("near") and not generated:
        first = next(iter(overlap.get("near_rows") or []), "")
        text = f"{_rows(overlap['near'])} to train on nearly repeat an evaluation row"
        hint = "data.filters={leakage: {against: [EVAL_FILE], near: 0.7}} takes such rows out"
        if "hash of" in str(splits.get("rule")):  # there is no file of evaluation rows
            hint = "data.filters={dedup: {near: 0.7}} leaves one of rows that nearly repeat each other"
        yield "near_leaks", f"{text} ({first})" if first else text, hint
    if overlap.get("question"):
        text = f"{_rows(overlap['question'])} to train on ask a question of the evaluation, and were dropped"
        yield "leaked_questions", text, "split by question: align data split keeps each on one side"
    if pairs.get("contradictory"):
        text = f"{_rows(pairs['contradictory'])} stand there with the preference the other way round too"
        yield "contradictory_pairs", text, "data.filters={contradictory: {}} drops them"
    turned = _part(pairs, "both_orders")
    against, rows = turned.get("against") or 0, turned.get("rows") or 0
    if not generated and LEAST <= against <= REVERSED * rows:
        text = (
            f"{turned['pairs']:,} of {turned['of']:,} pairs of answers stand in both orders, "
            f"{turned['against']:,} rows against their usual one"
        )
        yield "reversed_pairs", text, "look whether labels were swapped: align data stats FILE, and the rows themselves"
    notes = [Counter(_part(each, "notes")) for each in (card, *_part(card, "sources").values())]
    for word, count in missing_replies(sum(notes, Counter())).items():
        text = f"{count:,} replies say no more than '{word}', as tables write what is missing"
        yield "missing_replies", text, f"data.keep={{COLUMN: '!={word}'}} leaves such rows out"
    held = splits.get("eval")
    if isinstance(held, int) and 0 < held < FEW and int(splits.get("train") or 0) >= 2 * FEW:
        text = f"only {_rows(held)} held out, so that held-out numbers say little"
        hint = f"raise {where}.eval_share, or give {where}.eval_path"
        yield "few_held_out", text, hint if kind != PROMPT.value else f"{hint} ({_LENT})"


def _part(card: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = card.get(name)
    return found if isinstance(found, Mapping) else {}


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"
