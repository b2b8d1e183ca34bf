"""What is counted in data is said: near leaks, contradictions, swapped labels, leaked questions, few held out."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from data_prep.options import SourceOptions
from data_prep.quality.card_warnings import card_warnings
from data_prep.quality.missing_words import note_missing
from data_prep.quality.pair_bias import PairNumbers
from data_prep.records.keep import Condition
from data_prep.sources.rows import Row
from data_prep.splitting import EVAL, TRAIN, choose_sides
from data_prep.types import PROMPT, Conversation, Message, Preference, Prompt, RowKind


def codes(card: dict[str, Any]) -> list[str]:
    return [code for code, _, _ in card_warnings(card)]


def pair(number: int, chosen: str, rejected: str) -> Preference:
    return Preference((Message("user", f"question {number}"),), chosen, rejected, id=f"f:{number}")


def test_ten_per_cent_swapped_labels_are_noticed() -> None:
    """Eight pairs of answers under a hundred prompts; every tenth label is swapped."""
    sound, swapped = PairNumbers(), PairNumbers()
    for number in range(100):
        better, worse = f"kind reply {number % 7}", f"rude reply {number % 7}"
        sound.add(pair(number, better, worse))
        swapped.add(pair(number, *((worse, better) if number % 10 == 0 else (better, worse))))
    assert sound.card()["both_orders"] == {"pairs": 0, "of": 7, "rows": 0, "against": 0}
    assert swapped.card()["both_orders"] == {"pairs": 7, "of": 7, "rows": 100, "against": 10}
    assert codes({"pairs": sound.card()}) == []
    assert codes({"pairs": swapped.card()}) == ["reversed_pairs"]


def test_what_is_counted_is_said_and_nothing_else() -> None:
    assert codes({"overlap": {"near": 0, "question": 0}, "pairs": {"contradictory": 0}, "splits": {"eval": 300}}) == []
    card = {"overlap": {"near": 2, "question": 1}, "pairs": {"contradictory": 4}, "splits": {"train": 111, "eval": 9}}
    assert codes(card) == ["near_leaks", "leaked_questions", "contradictory_pairs", "few_held_out"]
    assert codes({"splits": {"train": 120, "eval": 0}}) == [], "nothing held out is a choice"
    assert codes({"splits": {"train": 40, "eval": 9}}) == [], "there are too few to hold out more"


@pytest.mark.parametrize(("with_file", "remedy"), [(False, "dedup"), (True, "leakage: {against: [EVAL_FILE]")])
def test_the_remedy_for_near_leaks_names_a_file_only_where_there_is_one(with_file: bool, remedy: str) -> None:
    ranks, wishes = np.arange(9, dtype=np.uint64), np.full(9, TRAIN, dtype=np.uint8)
    wishes[0] = EVAL if with_file else TRAIN
    rule = choose_sides(ranks, wishes, np.ones(9, dtype=np.uint32), SourceOptions(path="f"))[1]
    ((_, _, hint),) = card_warnings({"overlap": {"near": 2}, "splits": {"rule": rule}})
    assert remedy in hint


def test_the_option_named_is_that_of_the_rows() -> None:
    """Labelled replies stand under data.preferences."""
    hints = {}
    for kind in RowKind:
        ((_, _, hints[kind.name]),) = card_warnings({"kind": kind.value, "splits": {"train": 111, "eval": 9}})
    assert hints.pop(PROMPT.name).endswith(
        "of data.conversations, else of data.preferences, which they are taken from)"
    )
    assert hints == {
        kind.name: f"raise data.{kind.option}.eval_share, or give data.{kind.option}.eval_path"
        for kind in RowKind
        if kind != PROMPT
    }


def test_replies_that_tables_write_for_nothing_are_said() -> None:
    notes: Counter[str] = Counter()
    asked = (Message("user", "What is it?"),)
    for said in ("nan", " NaN", "None", "nan is a number", "N"):
        note_missing(Conversation((*asked, Message("assistant", said)), "f:1"), notes)
    note_missing(Preference(asked, "It is so.", "nan", "f:2"), notes)
    note_missing(Prompt(asked, "f:3"), notes)
    assert sorted(notes.values()) == [1, 3] and any("'none'" in note for note in notes)
    ((code, text, hint),) = card_warnings({"notes": dict(notes)})
    assert (code, text) == ("missing_replies", "3 replies say no more than 'nan', as tables write what is missing")
    assert hint == "data.keep={COLUMN: '!=nan'} leaves such rows out"
    assert codes({"notes": {}, "sources": {"a": {"notes": dict(notes)}, "b": {"notes": {}}}}) == ["missing_replies"]
    condition = Condition("completion", "!=nan")
    assert [condition.holds(Row("f", 1, {"completion": said})) for said in ("nan", "a")] == [False, True]
