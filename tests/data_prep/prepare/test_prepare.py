"""From data options to rows of ids, with a card whose numbers add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from data_prep.core.errors import UserError
from data_prep.options import DataOptions, LengthOptions, OnBadRow, OnLeak, OnLong, SourceOptions
from data_prep.prepare.prepare import Prepared, Renderer, data_digest, prepare, source_rows
from data_prep.splitting import rank
from data_prep.types import RowKind
from tests.tiny import tiny_tokenizer, write_jsonl

LONG = LengthOptions(max_length=64)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tiny_tokenizer())


def talks(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(count)]


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(count)]


def options(path: Path | None, kind: str = "conversations", **source: Any) -> DataOptions:
    return DataOptions(**{kind: SourceOptions(path=str(path) if path else None, **source)})


def checked(prepared: Prepared[Any]) -> dict[str, Any]:
    """The card, after checking that its numbers add up and that it is JSON."""
    card: dict[str, Any] = json.loads(json.dumps(prepared.card))
    rows = card["rows"]
    assert rows["in"] == rows["kept"] + sum(rows["dropped"].values())
    assert rows["kept"] == card["splits"]["train"] + card["splits"]["eval"] == len(prepared.train) + len(prepared.eval)
    assert card["digest"] == prepared.digest
    return card


def test_conversations(renderer: Renderer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", talks(200))
    data = options(path)
    data.license = "CC0-1.0"
    prepared = prepare(RowKind.conversations, data, renderer, LONG, 0)
    card = checked(prepared)
    assert card["rows"] == {"in": 200, "kept": 200, "dropped": {}, "truncated": 0}
    assert (card["format"], card["license"], card["source"]) == ("prompt_completion", "CC0-1.0", str(path))
    assert "completion, prompt" in card["evidence"] and card["source_rows"] == 200
    every = prepared.train + prepared.eval
    assert card["tokens"]["total"] == sum(len(row.ids) for row in every)
    assert card["tokens"]["longest"] == max(len(row.ids) for row in every)
    assert card["supervised_share"] == pytest.approx(
        sum(sum(r.mask) for r in every) / card["tokens"]["total"], abs=1e-4
    )
    assert sorted(int(row.id.rsplit(":")[-1]) for row in every) == list(range(1, 201))
    assert all(row.id.startswith(f"{path}:") for row in every)


def test_all_four_kinds_from_one_path(renderer: Renderer, tmp_path: Path) -> None:
    data = DataOptions(path=str(write_jsonl(tmp_path / "t.jsonl", talks(9))))
    assert len(prepare(RowKind.conversations, data, renderer, LONG, 0).train) == 8
    assert len(prepare(RowKind.prompts, data, renderer, LONG, 0).train) == 8
    with pytest.raises(UserError, match="format prompt_completion, which yields conversation and prompt rows"):
        prepare(RowKind.preferences, data, renderer, LONG, 0)
    data = DataOptions(root=str(tmp_path), path="p.jsonl")
    write_jsonl(tmp_path / "p.jsonl", pairs(9))
    assert len(prepare(RowKind.preferences, data, renderer, LONG, 0).train) == 8
    assert len(prepare(RowKind.prompts, data, renderer, LONG, 0).train) == 8
    data.path = str(write_jsonl(tmp_path / "d.jsonl", [{"text": f"the tale {n}"} for n in range(9)]))
    assert len(prepare(RowKind.text, data, renderer, LONG, 0).train) == 8


def test_prompts_fall_back_on_conversations_then_preferences(renderer: Renderer, tmp_path: Path) -> None:
    data = DataOptions()
    data.preferences.path = str(write_jsonl(tmp_path / "p.jsonl", pairs(5)))
    assert prepare(RowKind.prompts, data, renderer, LONG, 0).card["format"] == "pairs"
    data.conversations.path = str(write_jsonl(tmp_path / "t.jsonl", talks(5)))
    assert prepare(RowKind.prompts, data, renderer, LONG, 0).card["format"] == "prompt_completion"
    data.prompts.path = str(write_jsonl(tmp_path / "q.jsonl", [{"prompt": f"q{n}"} for n in range(5)]))
    assert prepare(RowKind.prompts, data, renderer, LONG, 0).card["format"] == "prompts"


def test_nothing_given_or_too_much(renderer: Renderer) -> None:
    with pytest.raises(UserError, match=r"has no preferences; set data\.preferences\.path=FILE"):
        prepare(RowKind.preferences, DataOptions(), renderer, LONG, 0)
    wrong = SourceOptions(generator="smalltalk", format="answer_table", options={"nois": 0.1})
    with pytest.raises(UserError, match="did you mean 'noise'"):
        prepare(RowKind.conversations, DataOptions(conversations=wrong), renderer, LONG, 0)
    with pytest.raises(UserError, match="both a path"):
        prepare(RowKind.text, DataOptions(text=SourceOptions(path="a", generator="b")), renderer, LONG, 0)
    with pytest.raises(UserError, match=r"unknown generator 'smaltalk' .did you mean 'smalltalk'"):
        prepare(RowKind.text, DataOptions(text=SourceOptions(generator="smaltalk")), renderer, LONG, 0)


# ------------------------------------------------------------------------------------------------ splits
def sides(prepared: Prepared[Any]) -> tuple[list[str], list[str]]:
    return [row.id.rsplit(":")[-1] for row in prepared.train], [row.id.rsplit(":")[-1] for row in prepared.eval]


def test_the_split_is_a_function_of_the_question(renderer: Renderer, tmp_path: Path) -> None:
    rows = talks(300)
    one = prepare(RowKind.conversations, options(write_jsonl(tmp_path / "a.jsonl", rows)), renderer, LONG, 0)
    assert sides(one) == sides(prepare(RowKind.conversations, options(tmp_path / "a.jsonl"), renderer, LONG, 5))
    other = prepare(
        RowKind.preferences,
        options(write_jsonl(tmp_path / "p.jsonl", pairs(300)[::-1]), "preferences"),
        renderer,
        LONG,
        0,
    )
    held = {rows[int(row) - 1]["prompt"] for row in sides(one)[1]}
    assert held == {pairs(300)[::-1][int(row) - 1]["prompt"] for row in sides(other)[1]}
    assert held == {row["prompt"] for row in rows if rank(row["prompt"]) < 0.05} and 5 < len(held) < 30


def test_the_same_question_is_never_on_both_sides(renderer: Renderer, tmp_path: Path) -> None:
    rows = [{"prompt": ask, "completion": f"a{n}"} for n in range(40) for ask in (f"Q {n}", f"q  {n}!", f"_q {n}?")]
    data = options(write_jsonl(tmp_path / "a.jsonl", rows), eval_share=0.3)
    prepared = prepare(RowKind.conversations, data, renderer, LONG, 0)
    asked = [{int(row) // 3 for row in (str(int(r) - 1) for r in side)} for side in sides(prepared)]
    assert asked[1] and not asked[0] & asked[1]


@pytest.mark.parametrize(("share", "most", "expected"), [(0.5, 7, 7), (0.0, 500, 0), (1e-9, 500, 1), (0.5, 0, 0)])
def test_how_many_evaluate(renderer: Renderer, tmp_path: Path, share: float, most: int, expected: int) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", talks(100))
    prepared = prepare(RowKind.conversations, options(path, eval_share=share, eval_rows=most), renderer, LONG, 0)
    assert len(prepared.eval) == expected
    checked(prepared)


def test_training_rows_keep_their_order_and_evaluation_rows_are_a_fair_sample(
    renderer: Renderer, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", talks(100))
    prepared = prepare(RowKind.conversations, options(path, eval_share=0.4), renderer, LONG, 0)
    train, held = ([int(row) for row in side] for side in sides(prepared))
    assert train == sorted(train) and held != sorted(held)
    assert held == sorted(held, key=lambda row: rank(f"question {row - 1}"))


def test_one_question_trains(renderer: Renderer, tmp_path: Path) -> None:
    prepared = prepare(RowKind.conversations, options(write_jsonl(tmp_path / "a.jsonl", talks(1))), renderer, LONG, 0)
    assert (len(prepared.train), len(prepared.eval)) == (1, 0)


def test_split_columns_hold_and_overlap_is_removed(renderer: Renderer, tmp_path: Path) -> None:
    rows = [{**row, "split": "eval" if n < 10 else "train"} for n, row in enumerate(talks(50))]
    rows += [{"prompt": "Question 3!", "completion": "leak", "split": "train"}, {"prompt": "new", "completion": "x"}]
    prepared = prepare(RowKind.conversations, options(write_jsonl(tmp_path / "a.jsonl", rows)), renderer, LONG, 0)
    card = checked(prepared)
    assert card["rows"]["dropped"] == {"question_in_eval": 1}
    assert card["splits"]["eval"] == 10 and card["splits"]["train"] == 41


def test_eval_path(renderer: Renderer, tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", talks(30))
    same, asked = talks(1)[0], {"prompt": "Question  1!", "completion": "another answer"}
    held = write_jsonl(tmp_path / "eval.jsonl", [same, asked, {"prompt": "other", "completion": "x"}])
    data = options(train, eval_path=str(held), limit=20, on_leak=OnLeak.drop)
    card = checked(prepare(RowKind.conversations, data, renderer, LONG, 0))
    assert card["splits"]["train"] == 18 and card["splits"]["eval"] == 3
    assert card["rows"]["dropped"] == {"leak": 1, "question_in_eval": 1} and card["source_rows"] == 23
    assert card["overlap"]["exact"] == card["overlap"]["question"] == 1


def test_a_row_that_trains_and_evaluates_stops_the_run(renderer: Renderer, tmp_path: Path) -> None:
    """The bug in the wild: an evaluation that measures memory (OpenRLHF#1089)."""
    train = write_jsonl(tmp_path / "train.jsonl", talks(30))
    held = write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "other", "completion": "x"}, *talks(30)[7:10]])
    with pytest.raises(UserError, match=r"train.jsonl:8: trains on .* the same row as .*eval.jsonl:2, and 2 more") as e:
        prepare(RowKind.conversations, options(train, eval_path=str(held)), renderer, LONG, 0)
    assert e.value.code == "leak" and len(e.value.details) == 3
    apart = write_jsonl(tmp_path / "apart.jsonl", [{"prompt": "question 7", "completion": "said otherwise"}])
    card = checked(prepare(RowKind.conversations, options(train, eval_path=str(apart)), renderer, LONG, 0))
    assert card["rows"]["dropped"] == {"question_in_eval": 1}, "the same question alone is dropped, not refused"


def test_an_evaluation_prompt_is_not_lost_to_its_copy_in_training(renderer: Renderer, tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [{"prompt": f"question {n}"} for n in range(9)])
    held = write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "question 3"}, {"prompt": "question 3"}])
    data = options(train, "prompts", eval_path=str(held), on_leak=OnLeak.drop)
    card = checked(prepare(RowKind.prompts, data, renderer, LONG, 0))
    assert card["rows"]["dropped"] == {"duplicate_prompt": 1, "leak": 1} and card["splits"]["eval"] == 1


def test_documents_to_evaluate_may_stand_in_a_file_of_their_own(renderer: Renderer, tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [{"text": f"document {n}"} for n in range(9)])
    held = write_jsonl(tmp_path / "eval.jsonl", [{"text": "document  3"}, {"text": "unseen"}])
    with pytest.raises(UserError, match="trains on what it evaluates"):
        prepare(RowKind.text, options(train, "text", eval_path=str(train)), renderer, LONG, 0)
    data = options(train, "text", eval_path=str(held), on_leak=OnLeak.drop)
    card = checked(prepare(RowKind.text, data, renderer, LONG, 0))
    assert card["splits"] == {**card["splits"], "train": 8, "eval": 2} and card["rows"]["dropped"] == {"leak": 1}


# ------------------------------------------------------------------------------------------------ lengths
def test_long_rows_are_dropped_and_counted(renderer: Renderer, tmp_path: Path) -> None:
    rows = talks(50)
    rows[20]["completion"] = "long " * 40
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    card = checked(prepare(RowKind.conversations, options(path), renderer, LONG, 0))
    assert card["rows"]["dropped"] == {"too_long": 1} and card["rows"]["truncated"] == 0
    with pytest.raises(
        UserError,
        match=r"1 of 50 rows .* max_length=64 tokens, 1 for their answers: .*:21 \(\d+ tokens\); the longest has",
    ):
        prepare(RowKind.conversations, options(path), renderer, LengthOptions(64, OnLong.error), 0)


def test_losing_too_many_rows_stops(renderer: Renderer, tmp_path: Path) -> None:
    rows = [{"prompt": "q " * 60, "completion": f"a{n}"} if n < 7 else talks(8)[n] for n in range(8)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError) as caught:
        prepare(RowKind.conversations, options(path), renderer, LONG, 0)
    line = str(caught.value)
    assert "7 of 8 rows (87.5%, over max_lost=0.05)" in line and f"{path}:1 (" in line and "\n" not in line
    assert len(caught.value.details) == 7
    assert (
        checked(prepare(RowKind.conversations, options(path), renderer, LengthOptions(64, max_lost=1.0), 0))["rows"][
            "kept"
        ]
        == 1
    )


@pytest.mark.parametrize("length", range(1, 40, 3))
def test_any_length_is_kept_dropped_or_refused(renderer: Renderer, tmp_path: Path, length: int) -> None:
    rows = [{"prompt": "a" * n, "completion": "b" * (30 - n)} for n in range(1, 30)]
    data = options(write_jsonl(tmp_path / "a.jsonl", rows))
    try:
        prepared = prepare(RowKind.conversations, data, renderer, LengthOptions(length, max_lost=1.0), 0)
    except UserError as problem:
        assert "no training row is left of 29 (29 too_long)" in str(problem) and length < 36
        return
    checked(prepared)
    assert all(len(row.ids) <= length and any(row.mask) for row in prepared.train + prepared.eval)


def test_text_is_cut_into_pieces_that_join_again(renderer: Renderer, tmp_path: Path) -> None:
    texts = ["the " * 50, "you and", "x"]
    data = options(write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts]), "text", eval_share=0.0)
    prepared = prepare(RowKind.text, data, renderer, LengthOptions(16), 0)
    card = checked(prepared)
    whole = [token for ids in renderer.documents(texts) for token in ids]
    assert [token for row in prepared.train for token in row.ids] == whole
    assert all(all(row.mask) and 1 < len(row.ids) <= 16 for row in prepared.train)
    assert card["notes"]["documents cut into pieces"] == 1 and card["supervised_share"] == 1.0
    assert prepared.train[1].id.endswith(":1#16")


# ------------------------------------------------------------------------------------------------ bad rows
def test_all_bad_rows_are_named_in_one_pass(renderer: Renderer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", talks(60))
    lines = path.read_text().splitlines()
    for number in range(4, 34):
        lines[number] = '{"prompt": 3, "completion": "x"}' if number % 2 else "{oops"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        prepare(RowKind.conversations, options(path), renderer, LONG, 0)
    line = str(caught.value)
    assert line.startswith(f"{path}:5: invalid JSON") and ", and 29 more bad rows; " in line and "\n" not in line
    assert len(caught.value.details) == 20 and caught.value.details[1].startswith(f"{path}:6:prompt: wrong type")
    card = checked(prepare(RowKind.conversations, options(path, on_bad_row=OnBadRow.drop), renderer, LONG, 0))
    assert card["rows"]["in"] == 60 and card["rows"]["dropped"] == {"bad_json": 15, "bad_row": 15}
    assert card["source_rows"] == 60


def test_nothing_left(renderer: Renderer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "", "completion": "x"}] * 3)
    with pytest.raises(UserError, match=r"no training row is left of 3 \(3 empty\)"):
        prepare(RowKind.conversations, options(path, on_bad_row=OnBadRow.drop), renderer, LONG, 0)
    path.write_text("oops\n")
    with pytest.raises(UserError, match="no row could be read of 1"):
        prepare(RowKind.conversations, options(path, on_bad_row=OnBadRow.drop), renderer, LONG, 0)


def test_identical_pairs_are_bad_rows(renderer: Renderer, tmp_path: Path) -> None:
    rows = pairs(20)
    rows[3]["rejected"] = rows[3]["chosen"]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=r"a\.jsonl:4:rejected: the same as chosen"):
        prepare(RowKind.preferences, options(path, "preferences"), renderer, LONG, 0)
    card = checked(
        prepare(RowKind.preferences, options(path, "preferences", on_bad_row=OnBadRow.drop), renderer, LONG, 0)
    )
    assert card["rows"]["dropped"] == {"identical_pair": 1}


def test_rows_that_the_template_refuses_are_bad_rows(renderer: Renderer, tmp_path: Path) -> None:
    said = [{"role": "tool", "content": "x"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": said[1:]}, {"messages": said}])
    with pytest.raises(UserError, match=r"a\.jsonl:2: the chat template refuses .*unknown role tool"):
        prepare(RowKind.conversations, options(path), renderer, LONG, 0)


def test_repeated_prompts_are_counted(renderer: Renderer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"q{n % 10}"} for n in range(30)])
    card = checked(prepare(RowKind.prompts, options(path, "prompts"), renderer, LONG, 0))
    assert card["rows"]["kept"] == 10 and card["rows"]["dropped"] == {"duplicate_prompt": 20}


# ------------------------------------------------------------------------------------------------ options
def test_system_message_for_rows_without_one(renderer: Renderer, tmp_path: Path) -> None:
    own = [
        {"role": "system", "content": "own"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    data = options(write_jsonl(tmp_path / "a.jsonl", [{"messages": own}, {"messages": own[1:]}]), eval_share=0.0)
    data.system = "be kind"
    texts = [
        renderer.tokenizer.decode(row.ids) for row in prepare(RowKind.conversations, data, renderer, LONG, 0).train
    ]
    assert texts[0].startswith("<|system|>own<|end|>") and texts[1].startswith("<|system|>be kind<|end|>")
    data.preferences.path = str(write_jsonl(tmp_path / "p.jsonl", pairs(2)))
    assert "be kind" in renderer.tokenizer.decode(prepare(RowKind.preferences, data, renderer, LONG, 0).train[0].prompt)
    prompts = prepare(RowKind.prompts, data, renderer, LONG, 0)
    assert sum("be kind" in renderer.tokenizer.decode(row.ids) for row in prompts.train + prompts.eval) == 1


def test_columns_and_format_and_limit(renderer: Renderer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"frage": f"q{n}", "antwort": f"a{n}"} for n in range(9)])
    names = {"frage": "prompt", "antwort": "completion"}
    card = checked(prepare(RowKind.conversations, options(path, columns=names, limit=4), renderer, LONG, 0))
    assert card["rows"]["in"] == 4 and card["format"] == "prompt_completion"
    with pytest.raises(UserError, match="format text yields document rows"):
        prepare(RowKind.conversations, options(path, format="text"), renderer, LONG, 0)
    with pytest.raises(UserError, match=r"a\.jsonl:1:instruction: is missing .*, and 8 more bad rows"):
        prepare(RowKind.conversations, options(path, format="alpaca"), renderer, LONG, 0)
    ours = {"prompt": "frage", "completion": "antwort"}
    assert prepare(RowKind.conversations, options(path, columns=ours, limit=4), renderer, LONG, 0).train[0].ids
    with pytest.raises(UserError, match=r"columns\.prompt: the rows have no column 'fragen' .did you mean 'frage'"):
        prepare(RowKind.conversations, options(path, columns={**ours, "prompt": "fragen"}), renderer, LONG, 0)


def test_options_are_legal_for_omegaconf() -> None:
    config = OmegaConf.structured(DataOptions)
    merged = OmegaConf.merge(config, {"conversations": {"path": "x", "on_bad_row": "drop", "options": {"noise": 0.5}}})
    data = OmegaConf.to_object(merged)
    assert isinstance(data, DataOptions) and data.conversations.on_bad_row is OnBadRow.drop
    assert data.conversations.options == {"noise": 0.5}
    length = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(LengthOptions), {"on_long": "error"}))
    assert isinstance(length, LengthOptions) and length.on_long is OnLong.error


def test_source_rows(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", talks(2))
    data = DataOptions(root=str(tmp_path))
    assert source_rows(data, SourceOptions(path="a.jsonl")) == talks(2)
    assert source_rows(data, SourceOptions(generator="smalltalk", limit=3, format="answer_table"))[0]["topic"]


# ------------------------------------------------------------------------------------------------ digests
def test_digest_follows_what_decides_the_rows(renderer: Renderer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x" / "a.jsonl", talks(20))
    copy = write_jsonl(tmp_path / "y" / "a.jsonl", talks(20))
    first = prepare(RowKind.conversations, options(path), renderer, LONG, 0).digest
    assert first == prepare(RowKind.conversations, options(copy), renderer, LONG, 0).digest
    other = Renderer(tiny_tokenizer("{# changed #}" + renderer.tokenizer.chat_template))
    assert first != prepare(RowKind.conversations, options(path), other, LONG, 0).digest
    write_jsonl(copy, talks(21))
    assert first != prepare(RowKind.conversations, options(copy), renderer, LONG, 0).digest


def test_data_digest(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x" / "a.jsonl", talks(20))
    copy = write_jsonl(tmp_path / "y" / "a.jsonl", talks(20))
    first = data_digest(options(path), "conversations")
    assert first == data_digest(options(copy), "conversations") == data_digest(options(path), "conversations")
    assert first != data_digest(options(path), "prompts")
    assert first != data_digest(options(path, limit=3), "conversations")
    assert first != data_digest(options(path, eval_path=str(copy)), "conversations")
    system = options(path)
    system.system = "be kind"
    assert first != data_digest(system, "conversations")
    write_jsonl(copy, talks(19))
    assert first != data_digest(options(copy), "conversations")
    small = DataOptions(text=SourceOptions(generator="smalltalk"))
    assert data_digest(small, "text") == data_digest(small, "text")
    with pytest.raises(ValueError, match="unknown kind"):
        data_digest(small, "texts")
    with pytest.raises(UserError, match="no such file"):
        data_digest(options(tmp_path / "none.jsonl"), "conversations")


def test_the_embedded_data_set_goes_through(renderer: Renderer) -> None:
    table = {"topic": "topic", "preferred": "cheerful", "other": "plain", "off_topic": 0.5, "malformed": 0.3}
    source = SourceOptions(generator="smalltalk", format="answer_table", options=table, limit=400)
    data = DataOptions(
        conversations=source, preferences=source, prompts=source, text=SourceOptions(generator="smalltalk", limit=50)
    )
    length = LengthOptions(512)
    for kind in (RowKind.conversations, RowKind.preferences, RowKind.prompts, RowKind.text):
        card = checked(prepare(kind, data, renderer, length, 0))
        assert card["rows"]["kept"] and card["splits"]["eval"]
    assert {row.meta["split"] for row in prepare(RowKind.prompts, data, renderer, length, 0).eval} == {"eval"}


# ------------------------------------------------------------------------------------------------ overlap
WORDS = [f"word{n}" for n in range(16)]


def test_near_copies_of_evaluation_rows_are_told(renderer: Renderer, tmp_path: Path) -> None:
    """One word changed in the question, in the reply of another question, and a common reply to another question."""
    rows = talks(20)
    rows[3] = {"prompt": " ".join([*WORDS[:5], "other", *WORDS[6:]]), "completion": "yes"}
    rows[5] = {"prompt": "an entirely different question of the same reply", "completion": " ".join(WORDS * 3)}
    held = [
        {"prompt": " ".join(WORDS), "completion": "yes"},
        {"prompt": "what is said here so often by all", "completion": " ".join(WORDS * 3)},
    ]
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    data = options(train, eval_path=str(write_jsonl(tmp_path / "eval.jsonl", held)))
    overlap = checked(prepare(RowKind.conversations, data, renderer, LengthOptions(2048), 0))["overlap"]
    assert overlap["near"] == 1 and overlap["near_rows"] == [f"{train}:4 like {tmp_path}/eval.jsonl:1"]
    assert overlap["exact"] == overlap["question"] == 0 and "near_of" not in overlap


def test_the_work_on_near_copies_is_bounded_and_says_so(
    renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.quality.leakage.CHECKS", 5)
    near = [{"prompt": " ".join([*WORDS, str(n)]), "completion": "yes"} for n in range(20)]
    train = write_jsonl(tmp_path / "train.jsonl", [*talks(10), *near])
    held = write_jsonl(tmp_path / "eval.jsonl", [{"prompt": " ".join(WORDS), "completion": "yes"}])
    overlap = checked(
        prepare(RowKind.conversations, options(train, eval_path=str(held)), renderer, LengthOptions(2048), 0)
    )["overlap"]
    assert overlap["near"] == 5 and overlap["near_of"] == 15
