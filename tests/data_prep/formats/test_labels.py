"""Rows of `align label`: who wins a pair that several people judged, what is left out, and which rows are no labels."""

from __future__ import annotations

import hashlib

import pytest

from data_prep.core.errors import UserError
from data_prep.formats.base import FORMATS
from data_prep.formats.detection import detect_format
from data_prep.options import DataOptions, LengthOptions, SourceOptions
from data_prep.prepare.prepare import prepare
from data_prep.rendering.renderer import Renderer
from data_prep.sources.rows import Row, Skip
from data_prep.types import PREFERENCE, UNPAIRED
from tests.tiny import tiny_tokenizer, write_jsonl


def label(choice, labeller="ann", prompt="Hi", a="one", b="two", **more):
    return {"prompt": prompt, "a": a, "b": b, "choice": choice, "labeller": labeller, **more}


def read(rows, kind=PREFERENCE):
    """(what the rows give, the notes)."""
    form = FORMATS.get("labels")()
    found = list(form.records(kind, [Row("f", place, row) for place, row in enumerate(rows, 1)]))
    return found, dict(form.notes)


def test_the_majority_wins_whichever_side_its_reply_stood_on():
    votes = [label("a"), label("b", "ben", a="two", b="one"), label("b", "cem")]
    found, notes = read(votes)
    assert [one.reason for one in found[:2]] == ["further_vote"] * 2
    assert (found[2].chosen, found[2].rejected, found[2].id) == ("one", "two", "f:1")
    assert notes == {"pairs on which labellers contradict each other": 1}


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        (["tie"], "tied"),
        (["bad"], "both_bad"),
        (["a", "b"], "no_majority"),
        (["a", "tie"], "no_majority"),
        (["tie", "tie", "a"], "tied"),
    ],
)
def test_a_pair_without_a_winner_is_left_out_with_a_reason(choices, reason):
    found, _ = read([label(choice, f"labeller {n}") for n, choice in enumerate(choices)])
    assert found[-1] == Skip(reason) and len(found) == len(choices)


def test_the_last_vote_of_a_labeller_is_the_one_that_counts():
    found, notes = read([label("a"), label("b")])
    assert found[-1].chosen == "two" and not notes


def test_labelled_replies_take_both_bad_ones_too():
    rows = [label("a"), label("bad", prompt="And?"), label("tie", prompt="So?")]
    found, _ = read(rows, UNPAIRED)
    assert [(one.reply, one.good) for one in found[:4]] == [
        ("one", True),
        ("two", False),
        ("one", False),
        ("two", False),
    ]
    assert found[4:] == [Skip("tied")] and len({one.id for one in found[:4]}) == 4


def test_a_text_is_one_question_whatever_it_looks_like():
    asked = 'Human: [{"role": "user", "content": "x"}] Assistant:'
    (one,), notes = read([label("a", prompt=asked, a='["x"]')])
    assert [message.content for message in one.prompt] == [asked] and one.chosen == '["x"]' and not notes
    (two,), _ = read([label("b", prompt=[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])])
    assert [message.role for message in two.prompt] == ["system", "user"]


@pytest.mark.parametrize(
    "row",
    [
        label("c"),
        label("A"),
        label(None),
        label("a", labeller=""),
        label("a", a=None),
        label("a", a="same", b="same"),
        label("a", prompt=[{"role": "assistant", "content": "x"}]),
    ],
    ids=str,
)
def test_what_is_no_vote_is_refused_by_its_row(row):
    found, _ = read([label("a", prompt="Else"), row])
    (problem,) = [one for one in found if isinstance(one, UserError)]
    assert (problem.file, problem.row) == ("f", 2)


def test_rows_are_labels_only_with_choices_to_show_for_it():
    assert detect_format(label("a"), PREFERENCE, rows=[label("a"), label("x")])[0].name == "labels"
    with pytest.raises(UserError, match="of the format prompts"):
        detect_format(label("B"), PREFERENCE, rows=[label("B")])


def test_the_file_is_read_at_once_and_its_card_names_it(tmp_path):
    rows = [label("ab"[n % 2], prompt=f"say {n}", seconds=1.5, stages={"a": "sft", "b": "ppo"}) for n in range(20)]
    path = write_jsonl(tmp_path / "labels.jsonl", [*rows, label("tie", prompt="say 7", a="x")])
    data = DataOptions(preferences=SourceOptions(path=str(path)))
    prepared = prepare(PREFERENCE, data, Renderer(tiny_tokenizer()), LengthOptions(128), 0)
    assert len(prepared.train) + len(prepared.eval) == 20 and prepared.card["rows"]["dropped"] == {"tied": 1}
    assert prepared.card["labels"] == {str(path): hashlib.sha256(path.read_bytes()).hexdigest()}
    assert "left_out" not in prepared.card
