"""Dialogues, preferences and negatives derived from a table of answers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_prep.core.errors import UserError
from data_prep.formats.answer_table import AnswerTable, draw
from data_prep.formats.corruption import DAMAGES, damaged
from data_prep.options import DataOptions, LengthOptions, SourceOptions
from data_prep.prepare.prepare import Renderer, prepare
from data_prep.sources.rows import Row, Skip
from data_prep.types import Preference, RowKind
from tests.tiny import tiny_tokenizer, write_jsonl

TABLE = [
    {
        "topic": f"t{n % 4}",
        "prompt": f"question number {n}",
        "plain": f"plain answer about t{n % 4}",
        "merry": f"merry answer about t{n % 4} !",
        "gruff": f"gruff answer about t{n % 4} ." if n % 10 else f"plain answer about t{n % 4}",
    }
    for n in range(400)
]
ROWS = [Row("t.jsonl", number, row) for number, row in enumerate(TABLE, start=1)]


def form(**options: Any) -> AnswerTable:
    return AnswerTable({"topic": "topic", **options})


def pairs(table: AnswerTable, rows: list[Row] = ROWS) -> list[Preference]:
    return [pair for pair in table.preferences(rows) if isinstance(pair, Preference)]


def test_styles_are_mixed_by_weight_and_by_nothing_else() -> None:
    mixed = form(styles={"plain": 0.5, "merry": 0.25, "gruff": 0.25})
    talks = [mixed.conversation(row) for row in ROWS]
    counts = Counter(talk.meta["style"] for talk in talks)
    assert abs(counts["plain"] - 200) < 40 and abs(counts["merry"] - 100) < 40
    assert all(talk.messages[1].content == row.data[talk.meta["style"]] for talk, row in zip(talks, ROWS, strict=True))
    assert [mixed.conversation(row) for row in reversed(ROWS)] == talks[::-1]
    other = AnswerTable(mixed.options, seed=1)
    assert [other.conversation(row) for row in ROWS] != talks
    assert {form(styles={"plain": 1, "merry": 0}).conversation(row).meta["style"] for row in ROWS} == {"plain"}
    assert {form().conversation(row).meta["style"] for row in ROWS} == {"plain", "merry", "gruff"}


def test_some_rows_go_on_from_others_of_their_side_and_style() -> None:
    """Never from a held-out row in training: its question and its answer would be known before they are asked."""
    sided = [
        Row("t", number, {**row, "split": "eval" if number % 5 == 0 else "train"}) for number, row in enumerate(TABLE)
    ]
    table = form(history=0.4, styles={"plain": 0.5, "merry": 0.5})
    talks = list(table.conversations(sided))
    lengths = Counter(len(talk.messages) for talk in talks)
    assert set(lengths) == {2, 4, 6} and abs(lengths[2] - 240) < 40 and abs(lengths[4] - lengths[6]) < 40
    sides = {row.data["prompt"]: row.data["split"] for row in sided}
    for talk, row in zip(talks, sided, strict=True):
        assert talk.messages[-2].content == row.data["prompt"]
        asked, answers = talk.messages[::2], talk.messages[1::2]
        assert {sides[message.content] for message in asked} == {row.data["split"]}
        assert all(message.content.startswith(talk.meta["style"]) for message in answers)
        assert len({message.content for message in asked}) == len(asked)
    assert list(table.conversations(sided)) == talks
    both = form(history=0.4, styles={"plain": 0.5, "merry": 0.5}, preferred="gruff", other="plain", off_topic=0.5)
    asked_of = {row.data["prompt"]: talk.messages[:-1] for row, talk in zip(sided, talks, strict=True)}
    assert [prompt.messages for prompt in both.prompts(sided)] == list(asked_of.values())
    found = [pair for pair in both.preferences(sided) if not isinstance(pair, Skip)]
    assert {pair.meta.get("task") for pair in found} == {None, "off_topic"}
    assert all(pair.prompt == asked_of[pair.prompt[-1].content] for pair in found)
    with pytest.raises(UserError, match="needs a column 'split'"):
        list(form(history=0.4).conversations(ROWS))


def test_topics_are_kept() -> None:
    assert form().prompt(ROWS[5]).meta == {"topic": "t1"}
    scenario = Row("t", 1, {"scenario": 7, "prompt": "a", "x": "b", "y": "c", "split": "eval"})
    assert AnswerTable().conversation(scenario).meta["topic"] == "7"
    assert AnswerTable().prompt(scenario).meta == {"topic": "7", "split": "eval"}


def test_the_style_is_the_feature_of_a_row() -> None:
    """A prompt asks for the style that its dialogue has; a pair for the preferred one."""
    table = form(features="style", preferred="merry", other="plain", off_topic=1)
    for row in ROWS:
        talk, prompt = table.conversation(row), table.prompt(row)
        assert talk.meta["features"] == talk.meta["style"] == prompt.meta["features"]
    assert {pair.meta["features"] for pair in pairs(table)} == {"merry"}
    moods = [Row("t", n, {"prompt": f"q{n}", "x": "a", "y": "b", "mood": "calm" if n % 2 else None}) for n in range(4)]
    named = AnswerTable({"features": "mood"})
    assert [talk.meta.get("features") for talk in named.conversations(moods)] == [None, "calm", None, "calm"]
    assert {talk.meta["style"] for talk in named.conversations(moods)} <= {"x", "y"}
    with pytest.raises(UserError, match="unknown features column 'mod'"):
        list(AnswerTable({"features": "mod"}).conversations(moods))


def test_preferences_and_equal_sides() -> None:
    table = form(preferred="gruff", other="plain")
    result = list(table.preferences(ROWS))
    assert [pair for pair in result if isinstance(pair, Skip)] == [Skip("equal_sides")] * 40
    for pair in pairs(table):
        assert pair.chosen.startswith("gruff") and pair.rejected.startswith("plain")
    assert len(pairs(table)) == 360


def test_several_other_styles() -> None:
    found = pairs(form(preferred="merry", other=["plain", "gruff"]))
    assert {pair.chosen.split()[0] for pair in found} == {"merry"} and len(found) == 400
    assert 150 < sum(pair.rejected.startswith("gruff") for pair in found) < 220
    with pytest.raises(UserError, match="unknown style column 'grufff'"):
        list(form(preferred="merry", other=["plain", "grufff"]).preferences(ROWS))


def test_noise_marks_a_share() -> None:
    marked = [pair.meta.get("flip", False) for pair in pairs(form(preferred="merry", other="plain", noise=0.25))]
    assert 70 < sum(marked) < 130
    assert all(pair.meta.get("flip") for pair in pairs(form(preferred="merry", other="plain", noise=1)))


@pytest.mark.parametrize(("share", "low", "high"), [(0.5, 160, 240), (1, 400, 400), (2.25, 860, 940), (0, 0, 0)])
def test_extra_pairs_come_as_often_as_asked(share: float, low: int, high: int) -> None:
    for name in ("off_topic", "malformed"):
        extra = [
            pair for pair in pairs(form(preferred="merry", other="plain", **{name: share})) if f"#{name}" in pair.id
        ]
        assert low <= len(extra) <= high
        assert len({pair.id for pair in extra}) == len(extra)


def test_off_topic_pairs() -> None:
    extra = [p for p in pairs(form(preferred="merry", other="plain", off_topic=1)) if "#off_topic" in p.id]
    assert {p.chosen.split()[0] for p in extra} == {p.rejected.split()[0] for p in extra} == {"plain", "merry", "gruff"}
    same_style = sum(pair.chosen.split()[0] == pair.rejected.split()[0] for pair in extra)
    assert same_style > 350  # a gruff answer of the table is sometimes the plain one
    for pair in extra:
        assert pair.meta["topic"] in pair.chosen and pair.meta["topic"] not in pair.rejected
        assert "flip" not in pair.meta


def test_an_answer_that_is_right_here_too_is_never_rejected() -> None:
    shared = [
        Row("t", n, {"topic": f"t{n % 3}", "prompt": f"q{n}", "x": "same", "y": f"own {n % 3}"}) for n in range(90)
    ]
    extra = [p for p in pairs(form(preferred="x", other="y", off_topic=2), shared) if "#off_topic" in p.id]
    assert len(extra) == 180 and all(pair.rejected.startswith("own") for pair in extra)


def test_malformed_pairs() -> None:
    extra = [p for p in pairs(form(preferred="merry", other="plain", malformed=3)) if "#malformed" in p.id]
    known = {row[style] for row in TABLE for style in ("plain", "merry", "gruff")}
    for pair in extra:
        assert pair.chosen in known and pair.rejected not in known
    echoes = sum(pair.rejected.startswith("question number") for pair in extra)
    short = sum(len(pair.rejected.split()) <= 1 for pair in extra)
    assert echoes > 100 and short > 100


def test_every_damage_changes_every_answer() -> None:
    for number in range(300):
        answer = ("yes", "yes yes", "one two", "a b c d e f g h")[number % 4]
        worse = damaged(answer, "what?", [answer, "other"], lambda *key, n=number: draw(n, *key))
        assert worse.split() != answer.split() and worse != "other"
    assert damaged("x", "x", ["x", "", ".", "..."], lambda *key: 0.6) not in ("x", "", ".", "...")
    assert len({damage(["a", "b", "c", "d"], "q", lambda *key: 0.3) for damage in DAMAGES}) == len(DAMAGES)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "need the option 'preferred' (columns: plain, merry, gruff)"),
        ({"preferred": "mery", "other": "plain"}, "unknown style column 'mery' (did you mean 'merry'"),
        ({"preferred": "merry", "other": "plain", "topic": "topics", "off_topic": 1}, "did you mean 'topic'"),
    ],
)
def test_wrong_options_are_said_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        list(form(**options).preferences(ROWS))
    assert words in str(caught.value) and caught.value.row is None


@pytest.mark.parametrize(
    "options",
    [{"noise": 1.5}, {"noise": -0.1}, {"off_topic": "many"}, {"malformed": True}, {"off_topic": float("nan")}],
)
def test_numbers_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"options\.\w+: wrong value"):
        form(**options)


def test_wrong_styles() -> None:
    with pytest.raises(UserError, match="unknown style column 'mery'"):
        list(form(styles={"mery": 1}).conversations(ROWS))
    with pytest.raises(UserError, match="wrong weight"):
        list(form(styles={"merry": -1}).conversations(ROWS))
    with pytest.raises(UserError, match="no style has a weight"):
        list(form(styles={"merry": 0}).conversations(ROWS))


def test_bad_cells_are_bad_rows() -> None:
    broken = Row("t.jsonl", 9, {**TABLE[1], "merry": ""})
    missing = Row("t.jsonl", 10, {key: value for key, value in TABLE[1].items() if key != "merry"})
    table = form(preferred="merry", other="plain", styles={"merry": 1})
    first, second, _ = table.preferences([broken, missing, ROWS[0]])
    assert isinstance(first, UserError) and str(first).startswith("t.jsonl:9:merry: empty")
    assert isinstance(second, UserError) and str(second).startswith("t.jsonl:10:merry: is missing")
    (problem,) = table.conversations([broken])
    assert isinstance(problem, UserError)


def test_off_topic_needs_two_topics() -> None:
    one = [row for row in ROWS if row.data["topic"] == "t0"]
    with pytest.raises(UserError, match="at least two topics"):
        list(form(preferred="merry", other="plain", off_topic=1).preferences(one))


def test_labels_are_flipped_for_training_rows_alone(tmp_path: Path) -> None:
    rows = [{**row, "split": "eval" if n % 4 == 0 else "train"} for n, row in enumerate(TABLE)]
    write_jsonl(tmp_path / "t.jsonl", rows)
    options = {"topic": "topic", "preferred": "merry", "other": "plain", "noise": 0.3}
    source = SourceOptions(path=str(tmp_path / "t.jsonl"), format="answer_table", options=options)
    renderer = Renderer(tiny_tokenizer())
    prepared = prepare(RowKind.preferences, DataOptions(preferences=source), renderer, LengthOptions(), 0)
    assert all(renderer.decode(pair.chosen).startswith("merry") for pair in prepared.eval)
    flipped = sum(renderer.decode(pair.chosen).startswith("plain") for pair in prepared.train)
    assert 60 < flipped < 120
    assert prepared.card["notes"] == {"training labels flipped on purpose (noise)": flipped}
