"""Several tasks: rows name theirs, evaluation tells them apart, and the whole stays the mean over all."""

from __future__ import annotations

import json

import pytest

from align.training.loop import MOST_TASKS, _held_out, by_task
from align.training.objectives import LanguageModeling, Pairwise
from data_prep.options import DataOptions, LengthOptions, SourceOptions
from data_prep.prepare.prepare import Renderer, prepare
from data_prep.types import RowKind, Tokens
from tests.tiny import tiny_tokenizer, write_jsonl
from tests.tiny_chain import made, own_data, talk
from tests.tiny_training import lora, options, pair_rows, token_rows, updater


def of_tasks(rows, names=("b", "a", None)):
    return [type(row)(**{**row.__dict__, "task": names[i % len(names)]}) for i, row in enumerate(rows)]


@pytest.mark.parametrize("kind", ["tokens", "pairs"])
def test_numbers_of_tasks_are_those_of_their_rows_alone(kind):
    role = lora(head=kind == "pairs")
    objective = LanguageModeling(role) if kind == "tokens" else Pairwise(role)
    rows = of_tasks(token_rows(13) if kind == "tokens" else pair_rows(13))
    runner = updater(objective, options(micro_batch_size=2), 1)
    found = _held_out(runner, rows).evaluate()
    whole = runner.evaluate([objective.collate(rows)])
    for name, value in whole.items():
        assert found[name] == pytest.approx(value, rel=1e-5)
        for task, shown in (("a", "a"), ("b", "b"), (None, "other")):
            own = runner.evaluate([objective.collate([row for row in rows if row.task == task])])
            assert found[f"{name}/{shown}"] == pytest.approx(own[name], rel=1e-5)


@pytest.mark.parametrize("names", [(None,), ("one",)])
def test_one_task_is_the_whole(names):
    runner = updater(LanguageModeling(lora()), options(), 1)
    assert set(_held_out(runner, of_tasks(token_rows(5), names)).evaluate()) == {"loss"}


def test_rows_with_very_many_tasks_are_not_told_apart():
    rows = [Tokens([5, 6], [False, True], f"r:{i}", task=f"t{i}") for i in range(MOST_TASKS + 1)]
    assert list(by_task(rows)) == [""] and len(by_task(rows[1:])) == MOST_TASKS


def test_the_task_column_travels_with_the_row(tmp_path):
    asked = [{"question": f"q {i}", "answer": f"a {i}", "task": f"t{i % 2}"} for i in range(6)]
    asked[0]["task"] = " "
    pairs = [{"prompt": f"q {i}", "chosen": f"a {i}", "rejected": "no", "task": "rank"} for i in range(6)]
    sources = [
        SourceOptions(path=str(write_jsonl(tmp_path / f"{name}.jsonl", rows)), eval_share=0.0)
        for name, rows in (("a", asked), ("b", pairs))
    ]
    data = DataOptions(conversations=sources[0], preferences=sources[1])
    renderer, length = Renderer(tiny_tokenizer()), LengthOptions(max_length=64)
    rows = list(prepare(RowKind.conversations, data, renderer, length, 0).train)
    assert [row.task for row in rows] == [None, "t1", "t0", "t1", "t0", "t1"]
    assert {row.task for row in prepare(RowKind.preferences, data, renderer, length, 0).train} == {"rank"}


def test_a_converted_row_keeps_its_task():
    from data_prep.formats.base import FORMATS
    from data_prep.tools.convert import as_row
    from data_prep.types import Conversation, Message

    said = (Message("user", "where is it"), Message("assistant", "here"))
    record = Conversation(said, "rows.jsonl:3", {"task": "find", "split": "eval"})
    for name in ("messages", "alpaca", "prompt_completion"):
        row = as_row(record, FORMATS.get(name)())
        assert (row["task"], row["split"]) == ("find", "eval")


def test_a_stage_logs_the_loss_of_each_task(tmp_path):
    rows = [{**row, "task": "even" if i % 2 else "odd"} for i, row in enumerate(talk(24))]
    words = own_data(tmp_path / "rows.jsonl", rows)
    run = made("sft", *words, "data.conversations.eval_share=0.4", "name=tasks", out=tmp_path)
    lines = [json.loads(line) for line in (run / "sft" / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in lines if row["split"] == "eval"]
    assert logged and all({"loss", "loss/even", "loss/odd"} <= set(row) for row in logged)
    metrics = json.loads((run / "run.json").read_text())["stages"][0]["metrics"]
    assert metrics["eval_loss/even"] == logged[-1]["loss/even"]
    page = (run / "report.html").read_text()
    assert "Loss, even" in page and "Loss, odd" in page
