"""The pipeline: planned once before its first stage, and what has changed since then is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from align.checkpoints.checkpoint import Checkpoint
from align.config.compose import compose
from align.planning import preflight, rows
from data_prep.core.errors import UserError
from tests.tiny_chain import base, copied, data_words, execute, finished, made, pipeline_words, read, rows_folder


def test_a_run_is_planned_once(tmp_path, monkeypatch):
    plans, plan = [], preflight._plan
    monkeypatch.setattr(
        preflight, "_plan", lambda config, spec, *rest: plans.append(spec.name) or plan(config, spec, *rest)
    )
    record = read(made("rlhf", "name=once", out=tmp_path, without="evaluate") / "run.json")
    assert plans == ["sft", "reward_model", "ppo"]
    assert [entry["on_parent"] for entry in record["stages"]] == [None, "continue", "continue"]


def test_what_was_planned_is_what_the_stage_made():
    """The plan of a stage says of its checkpoint what the finished checkpoint says of itself."""
    run = finished()
    config = compose([*pipeline_words("rlhf"), f"out={run.parent}"])
    plans = {plan.spec.name: plan for plan in preflight.plan_stages(config, base())}
    for stage, user in (("sft", "reward_model"), ("reward_model", "ppo")):
        planned = plans[user].reward if stage == "reward_model" else plans[user].init
        checkpoint = Checkpoint.open(run / stage)
        for what in ("role", "method", "options", "load"):
            assert getattr(planned, what) == getattr(checkpoint, what), (stage, what)
        mode = plans[stage].require().mode
        assert (mode.name if mode else None) == checkpoint.on_parent


def test_a_checkpoint_from_outside_that_is_replaced_after_planning_is_refused(tmp_path):
    run = copied(finished(), tmp_path)
    config = compose([*pipeline_words("sft"), f"stages.sft.init={run / 'sft'}", f"out={tmp_path}", "name=second"])
    (plan,) = preflight.require_plans(config, base())
    plan.begin(config, {}, base())
    record = read(run / "sft" / "checkpoint.json")
    (run / "sft" / "checkpoint.json").write_text(json.dumps({**record, "seed": 7}), encoding="utf-8")
    with pytest.raises(UserError, match="was replaced since this run saw it") as caught:
        plan.begin(config, {}, base())
    assert caught.value.code == "changed_file"


def test_weights_that_change_after_planning_are_refused(tmp_path):
    run = copied(finished(), tmp_path)
    config = compose([*pipeline_words("sft"), f"stages.sft.init={run / 'sft'}", f"out={tmp_path}", "name=second"])
    (plan,) = preflight.require_plans(config, base())
    with (run / "sft" / "adapter_model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x7f")
    with pytest.raises(UserError, match="content changed since"):
        plan.begin(config, {}, base())


def test_a_refused_new_run_leaves_no_trace(tmp_path):
    """Also where the run makes its own base: only then is it known that the adapter does not fit."""
    fresh = ["model=nano_blank", "model.config.num_hidden_layers=1", "model.tokenizer.vocab_size=300"]
    words = ["pipeline=pretrain", *fresh, *data_words(), "adapter=lora", "adapter.rank=5000", f"out={tmp_path}"]
    with pytest.raises(UserError, match="at most the width"):
        execute(compose([*words, "name=new"]))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("pipeline", "word", "said"),
    [
        ("ppo", "stages.ppo.batch_size=64", "fewer than one batch of 64"),
        ("evaluate", "stages.evaluate.max_new_tokens=300", "no room for a prompt"),
        ("evaluate", "stages.evaluate.pairs={bad}", "fits into 256 tokens"),
    ],
    ids=["rows", "room", "pairs"],
)
def test_a_new_run_that_its_first_stage_refuses_leaves_no_trace(pipeline, word, said, tmp_path):
    run = finished()
    row = {"prompt": "say " * 300, "chosen": "the owl", "rejected": "no"}
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    inputs = [f"stages.{pipeline}.init={run / 'sft'}", f"stages.{pipeline}.reward={run / 'reward_model'}"]
    words = [*pipeline_words(pipeline, *inputs), word.format(bad=tmp_path / "bad.jsonl"), f"out={tmp_path / 'runs'}"]
    with pytest.raises(UserError, match=said):
        execute(compose(words))
    assert not list((tmp_path / "runs").iterdir())


LATE = {"prompt": "say one", "chosen": "the owl"}
"""A row without a rejected reply."""


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("stages.ppo.batch_size=64", "fewer than one batch of 64"),
        ("stages.evaluate.max_new_tokens=300", "no room for a prompt"),
        ("data.preferences.path={bad}", "bad.jsonl:33:rejected"),
    ],
    ids=["rows", "room", "row"],
)
def test_rows_of_a_later_stage_are_read_before_the_first_is_trained(word, said, tmp_path):
    good = (rows_folder() / "preferences.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [*good[:32], json.dumps(LATE), *good[32:]]
    (tmp_path / "bad.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    words = [*pipeline_words("rlhf", "name=n"), word.format(bad=tmp_path / "bad.jsonl"), f"out={tmp_path / 'runs'}"]
    with pytest.raises(UserError) as caught:
        execute(compose(words))
    assert said in str(caught.value) and not list((tmp_path / "runs").iterdir())


def test_rows_are_read_ahead_once_and_never_where_all_is_done(tmp_path, monkeypatch):
    read_ahead = []
    require = rows.require_rows
    monkeypatch.setattr(rows, "require_rows", lambda config, plans, folder: read_ahead.append(len(plans)))
    run = made("rlhf", "name=n", out=tmp_path)
    made("rlhf", "name=n", out=tmp_path)
    assert read_ahead == [3]
    monkeypatch.setattr(rows, "require_rows", lambda *given: (read_ahead.append(len(given[1])), require(*given)))
    made("rlhf", "name=n", "stages.ppo.lr=1e-3", out=tmp_path)
    assert read_ahead == [3, 1] and read(run / "run.json")["status"] == "done"


def test_a_run_that_a_later_stage_refuses_keeps_what_is_done(tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps({**LATE, "rejected": "no " * 300}) + "\n", encoding="utf-8")
    words = [
        "name=n",
        f"stages.evaluate.pairs={tmp_path / 'bad.jsonl'}",
        f"stages.evaluate.reward={finished()}/reward_model",
    ]
    config = compose([*pipeline_words("rlhf", *words), f"out={tmp_path}"])
    config = replace(config, stages=[config.stages[0], config.stages[-1]])
    with pytest.raises(UserError, match="fits into 256 tokens"):
        execute(config)
    record = read(tmp_path / "n" / "run.json")
    assert record["status"] == "failed" and (tmp_path / "n" / "sft" / "checkpoint.json").is_file()
    with pytest.raises(UserError, match="fits into 256 tokens"):
        execute(replace(config, stages=config.stages[1:]))
    assert (tmp_path / "n" / "run.json").is_file(), "it was there before"
