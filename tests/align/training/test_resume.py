"""A stage that is stopped goes on where it was, and ends in the bits of one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from align.config.registries import adapters
from align.tracking.metrics import read_metrics
from align.training import resume
from align.training.inputs import Inputs
from align.training.loop import HeldOut
from align.training.resume import FOLDER, RECORD, STATE, StateSaver
from data_prep.core.errors import UserError
from tests.tiny_chain import finished, grid_beyond, made

pytestmark = pytest.mark.usefixtures("each_step")
OFTEN = "save_minutes=1e-9"
OPTIONS = {
    "lora": ["adapter.dropout=0.2"],
    "vera": ["adapter.dropout=0.2"],
    "bottleneck": ["adapter.dropout=0.2"],
    "full": ["stages.sft.neftune=5"],
    "delta_lora": ["adapter.start_step=2"],
    "adalora": ["adapter.hold=0.1", "adapter.settle=0.2", "adapter.every=1"],
}


CASES = {
    **{name: [f"adapter={name}", *OPTIONS.get(name, [])] for name in adapters.names()},
    "dora": ["adapter=lora", "adapter.dora=true"],
    "rows of tokens": ["adapter=lora", "adapter.dropout=0.2", "adapter.trainable_tokens=['<|user|>','<|end|>']"],
    "delta_lora in the weights": ["adapter=delta_lora", "adapter.form=literal", "adapter.start_step=2"],
    "adamw_8bit": ["adapter=full", "stages.sft.optimizer=adamw_8bit"],
    "sgd": ["adapter=lora", "stages.sft.optimizer=sgd"],
    "best-fit": ["adapter=lora", "stages.sft.micro_batch_size=0", "stages.sft.micro_tokens=64"],
}
KINDS = {"lora", "adalora", "delta_lora in the weights", "full", "qlora", "best-fit", "feature_extraction"}
"""One of each kind of state: plain tensors, a schedule's, moved weights, the base itself, what stands on four bits,
what the passes add, and a trunk cache, which is empty again. The others are for the grid."""


@pytest.fixture
def each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state is kept after every step, however long that takes."""
    monkeypatch.setattr(resume, "_SHARE", 0)


def sft_words(*more: str) -> list[str]:
    steps = ["max_steps=7", "eval_every=3", "batch_size=8", "micro_batch_size=3", OFTEN]
    return ["name=n", *(f"stages.sft.{word}" for word in steps), *more]


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let a stage stop as soon as the state after a step is kept."""
    original = StateSaver.offer

    def offer(self: StateSaver, updater: Any, at: int, more: dict[str, Any]) -> None:
        original(self, updater, at, more)
        if at == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(StateSaver, "offer", offer)


def contents(stage: Path) -> dict[str, bytes]:
    """What a finished stage holds; of the record what does not name times and places."""
    found = {str(path.relative_to(stage)): path.read_bytes() for path in sorted(stage.rglob("*")) if path.is_file()}
    for name in [name for name in found if name.endswith(("checkpoint.json", "README.md", "recipe.yaml"))]:
        del found[name]
    return found


def entry(run: Path, name: str) -> dict[str, Any]:
    record = json.loads((run / "run.json").read_text())
    (found,) = [stage for stage in record["stages"] if stage["name"] == name]
    return {key: found[key] for key in ("metrics", "tokens", "trainable", "total", "status")}


def both(
    pipeline: str, stage: str, words: list[str], step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **more: Any
) -> tuple[Path, Path]:
    """The folders of a run that was never stopped, and of one that was stopped after a step and begun again."""
    whole = made(pipeline, *words, out=tmp_path / "whole", **more)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, step)
        made(pipeline, *words, out=tmp_path / "stopped", **more)
    run = tmp_path / "stopped" / "n"
    assert [path.name for path in (run / f".staging-{stage}" / FOLDER).iterdir()] == [f"step-{step}"]
    made(pipeline, *words, out=tmp_path / "stopped", **more)
    assert not (run / stage / FOLDER).exists() and not (run / f".staging-{stage}").exists()
    return whole, run


@pytest.mark.parametrize("case", grid_beyond(CASES, KINDS))
def test_every_method_goes_on_to_the_same_bits(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = sft_words(*CASES[case])
    whole, run = both("sft", "sft", words, 5, tmp_path, monkeypatch)
    assert "sft: goes on after step 5, where it was stopped" in capfd.readouterr().err
    assert contents(run / "sft") == contents(whole / "sft")
    assert entry(run, "sft") == entry(whole, "sft")


HELD_OUT = (5.0, 4.0, 1.0, 3.0, 2.0)
"""The held-out loss of the weights after each step, made by hand: the third are the best, and must be kept."""


@pytest.mark.parametrize("step", grid_beyond([1, 2, 3, 4], {4}))
def test_any_step_will_do_and_the_best_evaluation_is_remembered(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []

    def evaluate(self: HeldOut) -> dict[str, float]:
        now = self.updater.weights()
        known = [all(torch.equal(now[name], one[name]) for name in now) for one in seen]
        seen.extend([] if any(known) else [now])
        return {"loss": HELD_OUT[[*known, True].index(True)]}

    monkeypatch.setattr(HeldOut, "evaluate", evaluate)
    words = sft_words("adapter=lora", *(f"stages.sft.{word}" for word in ("max_steps=5", "eval_every=1", "patience=9")))
    whole, run = both("sft", "sft", words, step, tmp_path, monkeypatch)
    rows = [row for row in read_metrics(whole / "sft" / "metrics.jsonl") if row["split"] == "eval"]
    assert [row["loss"] for row in rows] == [*HELD_OUT]
    assert entry(whole, "sft")["metrics"]["eval_loss"] == 1.0, "that of the weights which are saved"
    assert contents(run / "sft") == contents(whole / "sft")
    assert entry(run, "sft") == entry(whole, "sft")


def test_a_reward_model_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["name=n", f"stages.reward_model.{OFTEN}", "stages.reward_model.max_steps=7", "adapter=lora"]
    whole, run = both("reward_model", "reward_model", words, 5, tmp_path, monkeypatch)
    assert contents(run / "reward_model") == contents(whole / "reward_model")


@pytest.mark.parametrize("stage", grid_beyond(["dpo", "kto", "orpo"], {"kto"}))
def test_a_stage_of_judged_replies_goes_on(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it found before the first step is the same in the end, too."""
    words = ["name=n", f"stages.{stage}.init={finished() / 'sft'}", "adapter=lora"]
    words += [f"stages.{stage}.{word}" for word in (OFTEN, "max_steps=5", "micro_batch_size=3", "lr=1e-2")]
    whole, run = both(stage, stage, words, 3, tmp_path, monkeypatch)
    assert contents(run / stage) == contents(whole / stage)
    assert entry(run, stage) == entry(whole, stage)


@pytest.mark.parametrize("method", grid_beyond(["lora", "delta_lora", "adalora", "full"], {"lora"}))
def test_ppo_goes_on_with_the_same_replies(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = finished()
    words = ["name=n", f"stages.ppo.init={base / 'sft'}", f"stages.ppo.reward={base / 'reward_model'}"]
    words += [f"stages.ppo.{word}" for word in (OFTEN, "updates=4", "kl_target=0.5", "kl_horizon=20")]
    words += [f"stages.ppo.adapter={method}", "stages.ppo.on_parent=merge"]
    step = 4 if method == "lora" else 2  # after the last one there is no other reply to be kept
    whole, run = both("ppo", "ppo", words, step, tmp_path, monkeypatch)
    assert contents(run / "ppo") == contents(whole / "ppo")
    assert entry(run, "ppo") == entry(whole, "ppo")


def test_other_inputs_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = sft_words("adapter=lora")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 4)
        made("sft", *words, out=tmp_path)
    whole = made("sft", *sft_words("adapter=lora", "seed=1"), out=tmp_path / "whole")
    run = made("sft", *sft_words("adapter=lora", "seed=1"), out=tmp_path)
    assert contents(run / "sft") == contents(whole / "sft")


def test_without_minutes_nothing_is_kept_or_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 4)
        made("sft", *sft_words("adapter=lora"), out=tmp_path)
    seen: list[int] = []
    monkeypatch.setattr(StateSaver, "offer", lambda self, updater, step, more: seen.append(step))
    run = made("sft", *sft_words("adapter=lora", "stages.sft.save_minutes=0"), out=tmp_path)
    assert seen == [1, 2, 3, 4, 5, 6] and not (run / "sft" / FOLDER).exists()


OTHER_PASSES = {
    "smaller passes": ["stages.sft.micro_tokens=48"],
    "a budget for the first time": ["stages.sft.micro_batch_size=0", "stages.sft.micro_tokens=64"],
    "recomputed activations": ["stages.sft.gradient_checkpointing=true"],
}


@pytest.mark.parametrize("case", OTHER_PASSES)
def test_a_stage_goes_on_in_other_passes(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As one is told to where memory runs out. Rows, their order and every update stay; they round otherwise."""
    words = sft_words("adapter=lora", "stages.sft.batch_size=4", "stages.sft.max_steps=8")
    words += ["stages.sft.micro_tokens=96"] if case == "smaller passes" else []
    whole = made("sft", *words, out=tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 1)
        made("sft", *words, out=tmp_path)
    capfd.readouterr()
    run = made("sft", *words, *OTHER_PASSES[case], out=tmp_path)
    told = capfd.readouterr().err
    changed = OTHER_PASSES[case][-1].removeprefix("stages.sft.")
    assert "sft: goes on after step 1, where it was stopped" in told
    assert f"warning: from step 1 on computed with {changed} (" in told.replace("micro_batch_size=0 (3 before), ", "")
    rows = [read_metrics(each / "sft" / "metrics.jsonl") for each in (whole, run)]
    losses = [[row["loss"] for row in each if row["split"] == "train"] for each in rows]
    tokens = [[row["tokens"] for row in each if row["split"] == "train"] for each in rows]
    assert losses[1][:1] == losses[0][:1] and tokens[1] == tokens[0], "no batch twice, none left out"
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_state_of_other_options_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A rate that was tried beside does not cost the week before it."""
    words = sft_words("adapter=lora")
    whole = made("sft", *words, out=tmp_path / "whole")
    for step, more in ((5, []), (2, ["stages.sft.lr=0.5"])):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(patch, step)
            made("sft", *words, *more, out=tmp_path)
    told = capfd.readouterr().err
    assert "sft: begins anew with lr=0.5 (" in told
    assert "without, the state after step 5 is still there to go on from" in told
    run = made("sft", *words, out=tmp_path)
    assert "sft: goes on after step 5, where it was stopped" in capfd.readouterr().err
    assert contents(run / "sft") == contents(whole / "sft")
    assert not [path for path in run.rglob(f"{FOLDER}*")], "a finished stage keeps none"


def test_a_state_set_aside_is_found_behind_one_that_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run with other options was killed while it wrote its first state."""
    words = sft_words("adapter=lora")
    for step, more in ((5, []), (2, ["stages.sft.lr=0.5"])):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(patch, step)
            made("sft", *words, *more, out=tmp_path)
    own = tmp_path / "n" / ".staging-sft" / FOLDER
    (own / "step-2").rename(own / ".writing")
    (own / ".writing" / RECORD).unlink()
    inputs = next(own.parent.glob(f"{FOLDER}-*/step-5/{RECORD}"))
    found = resume.prepare(own.parent, Inputs(json.loads(inputs.read_text())["inputs"]), 10.0)
    assert (found.step, found.changed, found.aside) == (5, (), 0)
    assert [path.name for path in own.iterdir()] == ["step-5"]


def test_what_has_changed_is_named() -> None:
    before = Inputs(
        {"options": {"lr": 1.0, "micro_tokens": 0}, "adapter": {"rank": 8}, "data": {"rows": "a"}, "seed": 0}
    )
    after = Inputs(
        {"options": {"lr": 2.0, "micro_tokens": 9}, "adapter": {"rank": 4}, "data": {"rows": "b"}, "seed": 0}
    )
    assert after.changed_from(before) == [
        "adapter.rank=4 (8 before)",
        "data",
        "lr=2.0 (1.0 before)",
        "micro_tokens=9 (0 before)",
    ]
    passes = Inputs({**before.values, "options": {"lr": 1.0, "micro_tokens": 9}})
    assert passes.work_digest == before.work_digest != after.work_digest and passes.digest != before.digest


def test_a_state_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 4)
        made("sft", *sft_words("adapter=lora"), out=tmp_path)
    state = tmp_path / "n" / ".staging-sft" / FOLDER / "step-4" / STATE
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(UserError, match="kept state cannot be read") as caught:
        made("sft", *sft_words("adapter=lora"), out=tmp_path)
    assert caught.value.hint is not None and str(state.parent.parent) in caught.value.hint
    assert "\n" not in str(caught.value)
    (state.parent / RECORD).unlink()  # a state that was never finished does not count
    assert (made("sft", *sft_words("adapter=lora"), out=tmp_path) / "sft").is_dir()


def test_a_state_that_cannot_be_written_does_not_stop_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume, "sync", full)
    run = made("sft", *sft_words("adapter=lora"), out=tmp_path)
    told = [line for line in capfd.readouterr().err.splitlines() if "was not kept" in line]
    assert len(told) == 6 and "No space left on device" in told[0] and (run / "sft" / "checkpoint.json").is_file()


def test_states_are_kept_no_more_often_than_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, takes, kept = [0.0], [0.0], []

    def keep(self: StateSaver, updater: Any, step: int, more: dict[str, Any]) -> None:
        now[0] += takes[0]
        kept.append(step)

    monkeypatch.setattr(resume, "_SHARE", 50)
    monkeypatch.setattr(resume.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(StateSaver, "_keep", keep)
    quiet: Any = SimpleNamespace(ends=False, trains_parts=False)
    saver, idle = (
        StateSaver(tmp_path, Inputs({}), minutes=10.0),
        StateSaver(tmp_path, Inputs({}), minutes=10.0, writes=False),
    )
    for step in range(1, 61):
        now[0] += 60.0
        saver.offer(quiet, step, {})
        idle.offer(quiet, step, {})
    assert kept == [10, 20, 30, 40, 50, 60]
    takes[0] = 24.0  # a fiftieth of twenty minutes
    for step in range(61, 121):
        now[0] += 60.0
        saver.offer(quiet, step, {})
    assert kept[6:] == [70, 90, 110]
