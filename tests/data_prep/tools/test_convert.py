"""Rows to other rows: what is written says the same, or the row is named; nothing is half written or written over."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.core.errors import UserError
from data_prep.filters.dedup import Dedup
from data_prep.formats.base import FORMATS
from data_prep.options import DataOptions, OnBadRow, SourceOptions
from data_prep.records.stream import Given
from data_prep.sources.writers import row_writer
from data_prep.splitting import held_out_by_count
from data_prep.tools.convert import as_row, convert, dedup, split, writable
from data_prep.types import (
    CONVERSATION,
    DOCUMENT,
    PREFERENCE,
    PROMPT,
    UNPAIRED,
    Conversation,
    Document,
    Labelled,
    Message,
    Preference,
    Prompt,
)
from tests.records import read_records
from tests.tiny import write_jsonl

CALL = {"name": "weather", "arguments": {"city": "Bern"}}
TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},)
ONE = (Message("user", "Hi ÄŸ\n\t\u2028 <|end|>"), Message("assistant", "Hello."))
SYSTEM = (Message("system", "Be kind."), *ONE)
LONG = (*SYSTEM, Message("user", "And?"), Message("assistant", "Nothing."))
TRAINED = (
    *ONE,
    Message("user", "b"),
    Message("assistant", "c", train=False),
    *ONE[:1],
    Message("assistant", "d", weight=0.5),
)
USED = (
    Message("user", "Weather?"),
    Message("assistant", "", calls=(CALL,)),
    Message("tool", '{"sun": true}'),
    Message("assistant", "Sunny."),
)
NAMED = (
    Message("user", "Weather?"),
    Message("assistant", "Let me look.", calls=({**CALL, "id": "c1"},)),
    Message("tool", "sun", name="weather", call_id="c1"),
    Message("assistant", "Sunny."),
)


def of(path: Path, **source: Any) -> Given:
    return Given(DataOptions(), SourceOptions(path=str(path), **source))


def plain(path: str | Path, kind: str) -> list[Any]:
    """The records of a file, without their ids."""
    records, tally, _ = read_records(of(Path(path)), kind, 0)
    tally.check_bad_rows(OnBadRow.refuse)
    return [replace(record, id="") for record in records]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------ round trips
@pytest.mark.parametrize(
    ("form", "record"),
    [
        *(
            (form, Conversation(m, "a:1"))
            for form in ("messages", "sharegpt", "alpaca", "dolly")
            for m in (ONE, SYSTEM, LONG)
        ),
        *(
            (form, Conversation(m, "a:1"))
            for form in ("prompt_completion", "question_answer", "p3")
            for m in (ONE, SYSTEM)
        ),
        ("prompt_completion", Conversation(LONG, "a:1", {"split": "eval"})),
        *((form, Conversation(TRAINED, "a:1", {"split": "train"})) for form in ("messages", "sharegpt")),
        *((form, Conversation(USED, "a:1", {}, TOOLS)) for form in ("messages", "sharegpt")),
        ("messages", Conversation(NAMED, "a:1", {}, TOOLS)),
        *((form, Preference(m[:-1], "yes", "no", "a:1")) for form in ("pairs",) for m in (ONE, SYSTEM, LONG)),
        ("pairs", Preference(USED[:-1], "yes", "no", "a:1", 0.5, {"split": "eval"}, TOOLS)),
        ("stack_exchange", Preference(ONE[:-1], "yes", "no", "a:1")),
        *(("kto", Labelled(m[:-1], "yes", good, "a:1")) for m in (ONE, SYSTEM, LONG) for good in (True, False)),
        *(("prompts", Prompt(m[:-1], "a:1", {"topic": "t"})) for m in (ONE, SYSTEM, LONG)),
        ("text", Document("Once\n\nupon", "a:1", {"split": "eval"})),
    ],
)
def test_a_row_is_read_as_what_was_written(form: str, record: Any) -> None:
    row = as_row(record, FORMATS.get(form)({}, 0))
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize(
    ("form", "record"),
    [
        ("alpaca", Conversation(TRAINED, "a.jsonl:7")),
        ("alpaca", Conversation(USED, "a.jsonl:7", {}, TOOLS)),
        ("alpaca", Conversation((Message("user", "a"), *ONE), "a.jsonl:7")),
        ("sharegpt", Conversation(NAMED, "a.jsonl:7", {}, TOOLS)),
        ("prompt_completion", Conversation((*ONE[:1], Message("assistant", "a <|endoftext|>")), "a.jsonl:7")),
    ],
)
def test_what_a_format_cannot_say_is_refused_by_name(form: str, record: Any) -> None:
    with pytest.raises(UserError, match=f"^a.jsonl:7: cannot be said in the format {form} without loss"):
        as_row(record, FORMATS.get(form)({}, 0))


WORDS = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=8).filter(
    lambda text: any(c.isalnum() for c in text)
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), st.none() | WORDS)
def test_any_dialogue_goes_to_every_format_of_dialogues_or_is_refused(turns, system):
    said = [Message("system", system)] if system else []
    for question, answer in turns:
        said += [Message("user", question), Message("assistant", answer)]
    record = Conversation(tuple(said), "a:1")
    for name, kind in writable().items():
        if kind == CONVERSATION and name not in ("question_answer", "p3"):
            as_row(record, FORMATS.get(name)({}, 0))


def test_every_kind_of_record_can_be_written() -> None:
    assert set(writable().values()) == {CONVERSATION, PREFERENCE, UNPAIRED, PROMPT, DOCUMENT}
    assert {"messages", "sharegpt", "alpaca", "prompt_completion", "pairs", "kto", "prompts", "text"} <= set(writable())


# ------------------------------------------------------------------------------------------------ files
def test_files_are_converted_there_and_back(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {n}", "input": "in words" * (n % 2), "output": f"{n}!"} for n in range(5)]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    result = convert(of(source), "messages", str(tmp_path / "m.jsonl.gz"))
    assert result.rows() == {"in": 5, "kept": 5, "dropped": {}}
    convert(of(tmp_path / "m.jsonl.gz"), "sharegpt", str(tmp_path / "s.jsonl"))
    convert(of(tmp_path / "s.jsonl"), "alpaca", str(tmp_path / "back.jsonl"))
    assert plain(source, CONVERSATION) == plain(tmp_path / "back.jsonl", CONVERSATION)
    assert plain(source, CONVERSATION) == plain(tmp_path / "m.jsonl.gz", CONVERSATION)
    convert(of(source), "prompts", str(tmp_path / "p.jsonl"))
    assert lines(tmp_path / "p.jsonl")[1] == {"prompt": "Say 1\n\nin words"}


def test_a_file_that_cannot_be_begun_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="cannot be written: File name too long"),
        row_writer(f"{tmp_path / ('a' * 250)}.jsonl"),
    ):
        pass


def test_a_row_that_cannot_be_said_leaves_no_file(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": r, "content": r} for r in roles]} for roles in (
        ("user", "assistant"), ("user", "user", "assistant"), ("user", "assistant", "user"),
    )])  # fmt: skip
    with pytest.raises(UserError, match=r"a.jsonl:2: cannot be said in the format alpaca .* 1 more bad row"):
        convert(of(source), "alpaca", str(tmp_path / "b.jsonl"))
    assert os.listdir(tmp_path) == ["a.jsonl"]
    kept = convert(of(source, on_bad_row=OnBadRow.drop), "alpaca", str(tmp_path / "b.jsonl"))
    assert kept.rows() == {"in": 3, "kept": 1, "dropped": {"not_the_same": 2}}


def test_nothing_is_written_over_or_beside_the_point(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    for to, message in (
        (source, "exists already"),
        (tmp_path / "b.csv", "what is written is JSONL"),
        (tmp_path / "none" / "b.jsonl", "its folder does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            convert(of(source), "messages", str(to))
    with pytest.raises(UserError, match=r"unknown format 'mesages' \(did you mean 'messages'"):
        convert(of(source), "mesages", str(tmp_path / "b.jsonl"))
    with pytest.raises(UserError, match="rows of the format oasst cannot be written"):
        convert(of(source), "oasst", str(tmp_path / "b.jsonl"))
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    with pytest.raises(UserError, match="exists already"), row_writer(str(path)) as writer:
        writer.write({"a": 1})
        path.write_text("mine")
    assert path.read_text() == "mine" and os.listdir(tmp_path) == ["b.jsonl"]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        with row_writer(str(tmp_path / name)) as writer:
            writer.write({"text": "ä"})
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).decode() == '{"text": "ä"}\n'


# ------------------------------------------------------------------------------------------------ dedup
def test_dedup_writes_rows_as_they_stand(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"q {n}", "completion": "a", "more": [n, None, 1.5]} for n in range(4)]
    rows += [{"completion": "A", "prompt": "Q  1", "more": "other"}, rows[0]]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    result = dedup(of(source), Dedup(), str(tmp_path / "b.jsonl"))
    assert lines(tmp_path / "b.jsonl") == rows[:4]
    assert result.rows() == {"in": 6, "kept": 4, "dropped": {"duplicate": 2}}
    assert result.removed == [f"{source}:5 repeats {source}:2", f"{source}:6 repeats {source}:1"]
    again = dedup(of(tmp_path / "b.jsonl"), Dedup(), str(tmp_path / "c.jsonl"))
    assert again.rows()["dropped"] == {} and (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "c.jsonl").read_bytes()


def test_rows_that_belong_together_are_not_taken_apart(tmp_path: Path) -> None:
    tree = {"message_tree_id": "t", "prompt": {"text": "a", "role": "prompter", "replies": []}}
    source = write_jsonl(tmp_path / "a.jsonl", [tree])
    with pytest.raises(UserError, match="rows of the format oasst belong together"):
        dedup(of(source), Dedup(), str(tmp_path / "b.jsonl"))


# ------------------------------------------------------------------------------------------------ split
def test_no_question_is_in_both_files(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {n % 50}{'?' * (n % 3)}", "completion": f"{n}"} for n in range(200)]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    names = {"train": str(tmp_path / "t.jsonl"), "eval": str(tmp_path / "e.jsonl")}
    result = split(of(source), 0.2, None, names)
    train, held = lines(tmp_path / "t.jsonl"), lines(tmp_path / "e.jsonl")
    assert result.counts == {"train": len(train), "eval": len(held)} and len(held) == 40
    assert sorted(train + held, key=lambda r: int(r["completion"])) == rows
    asked = [{row["prompt"].rstrip("?") for row in side} for side in (train, held)]
    assert not asked[0] & asked[1]
    order = [rows[place] for place in range(199, -1, -1)]
    moved = {"train": str(tmp_path / "t2.jsonl"), "eval": str(tmp_path / "e2.jsonl")}
    split(of(write_jsonl(tmp_path / "b.jsonl", order)), 0.2, None, moved)
    assert sorted(map(str, lines(tmp_path / "e2.jsonl"))) == sorted(map(str, held)), "the order of rows does not matter"


@pytest.mark.parametrize(
    ("sizes", "share", "rows"),
    [
        ([1] * 120, 0.2, 24),
        ([6] * 20, 0.2, 24),
        ([7] * 10, 0.2, 14),
        ([5] * 10, 0.14, 5),  # 7 wanted: 5 is nearer than 10
        ([5] * 10, 0.18, 10),  # 9 wanted
        ([100, 100, 3], 0.5, 103),
        ([2, 90], 0.9, 2),  # the other one trains
        ([40, 60], 0.01, 40),
        ([9], 0.5, 0),
    ],
)
def test_the_share_is_that_of_the_rows(sizes: list[int], share: float, rows: int) -> None:
    questions = {f"question {n}": size for n, size in enumerate(sizes)}
    held = held_out_by_count(questions, share)
    assert sum(questions[question] for question in held) == rows


def test_every_value_of_the_column_is_on_both_sides(tmp_path: Path) -> None:
    rows = [{"prompt": f"q {n}", "completion": "a", "task": "rare" if n % 20 == 0 else "usual"} for n in range(400)]
    names = {"train": str(tmp_path / "t.jsonl"), "eval": str(tmp_path / "e.jsonl")}
    result = split(of(write_jsonl(tmp_path / "a.jsonl", rows)), 0.1, "task", names)
    rare, usual = result.strata["rare"], result.strata["usual"]
    assert sum(rare.values()) == 20 and rare["eval"] == 2
    assert sum(usual.values()) == 380 and usual["eval"] == 38
    with pytest.raises(UserError, match=r"a.jsonl:1:kind: is missing \(expected the column to split by\)"):
        split(
            of(tmp_path / "a.jsonl"),
            0.1,
            "kind",
            {"train": str(tmp_path / "x.jsonl"), "eval": str(tmp_path / "y.jsonl")},
        )


def test_rows_that_say_their_side_are_not_split_again(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "split": "train"}])
    with pytest.raises(UserError, match=r"a.jsonl:1:split: says which side the row is on"):
        split(of(source), 0.1, None, {"train": str(tmp_path / "x.jsonl"), "eval": str(tmp_path / "y.jsonl")})
    assert os.listdir(tmp_path) == ["a.jsonl"]
