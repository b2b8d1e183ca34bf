"""SIGINT and SIGTERM: the first ends the step and keeps its state, the second leaves at once; nothing is lost."""

from __future__ import annotations

import importlib
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from align.cli.dispatch import main
from data_prep.core.interrupts import interrupts
from tests.align.training.test_resume import contents
from tests.tiny_chain import pipeline_words, read

GOES_ON = "the state after step {} is kept: the same command goes on there"
FIRST = "the same command goes on with the first unfinished stage"
MOMENTS = [
    ("align.training.optimizer:Updater.step", 1, GOES_ON.format(1)),
    ("align.training.loop:HeldOut.evaluate", 1, GOES_ON.format(2)),
    ("align.stages.supervised:greedy_samples", 1, "sft is done: the same command goes on behind it"),
    ("align.training.context:StageContext.rows", 1, FIRST),
    ("align.training.saving:save_result", 1, "reward_model is done: the same command goes on behind it"),
    ("align.rl.rollouts:Rollouts.sample", 1, GOES_ON.format(1)),
    ("align.training.optimizer:Updater.step", 2, GOES_ON.format(2)),
    ("align.pipeline:publish", 1, "ppo is done: the same command goes on behind it"),
    ("align.stages.evaluate:Evaluate._replies", 2, FIRST),
    ("align.pipeline:publish", 1, "all stages are done"),
    ("align.runs.record:Run.finish", 4, "all stages are done"),
]
"""Where a signal comes: a function, at which of its calls since the run went on, and what the run says of it."""


def at_call(patch: pytest.MonkeyPatch, place: str, number: int, act: Callable[[], Any]) -> None:
    """Do something as a function of the project is called for the `number`th time."""
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for one in outer:
        owner = getattr(owner, one)
    original, seen = getattr(owner, name), [0]

    def counted(*given: Any, **more: Any) -> Any:
        seen[0] += 1
        if seen[0] == number:
            act()
        return original(*given, **more)

    patch.setattr(owner, name, counted)


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def words_of(out: Path) -> list[str]:
    short = ["stages.sft.max_steps=3", "stages.sft.eval_every=2", "stages.ppo.updates=3", "stages.ppo.critic_warmup=1"]
    return ["run", *pipeline_words("rlhf", "name=n", *short), f"out={out}"]


def same(run: Path, whole: Path) -> None:
    """Two run folders hold the same bits in every stage."""
    for stage in ("sft", "reward_model", "ppo", "evaluate"):
        assert contents(run / stage).keys() >= {"metrics.jsonl"} - ({"metrics.jsonl"} if stage == "evaluate" else set())
        assert contents(run / stage) == contents(whole / stage), stage


def test_a_chain_that_is_stopped_at_every_turn_ends_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(words_of(tmp_path / "whole")) == 0
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for turn, (place, number, said) in enumerate(MOMENTS):
        capfd.readouterr()
        with monkeypatch.context() as patch:
            at_call(patch, place, number, send((signal.SIGTERM, signal.SIGINT)[turn % 2]))
            assert main(words_of(tmp_path / "stopped")) == 130, place
        assert capfd.readouterr().err.endswith(f"align: interrupted; {said}\n"), place
        assert read(tmp_path / "stopped" / "n" / "run.json")["status"] == ("done" if "all" in said else "stopped")
    assert main(words_of(tmp_path / "stopped")) == 0
    same(tmp_path / "stopped" / "n", tmp_path / "whole" / "n")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_second_signal_leaves_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the middle of a step: neither its end nor the report is waited for."""
    words = ["run", *pipeline_words("sft", "name=n"), f"out={tmp_path}"]
    later: list[str] = []
    with monkeypatch.context() as patch:
        at_call(patch, "align.training.optimizer:Updater._clip", 1, lambda: [send(signal.SIGINT)() for _ in range(2)])
        at_call(patch, "align.training.optimizer:Updater.rate_factor", 1, lambda: later.append("the step went on"))
        assert main(words) == 130
    assert not later and not (tmp_path / "n" / ".staging-sft" / "resume").exists()
    err = capfd.readouterr().err
    assert "align: ends after this step and keeps its state; once more leaves at once" in err
    assert err.endswith(f"align: interrupted; {FIRST}\n")
    assert read(tmp_path / "n" / "run.json")["status"] == "stopped"


def test_signals_of_somebody_else_are_left_alone() -> None:
    with interrupts.handled():
        assert signal.getsignal(signal.SIGTERM) == interrupts._come
        with interrupts.handled():  # a run inside a run
            pass
        assert signal.getsignal(signal.SIGTERM) == interrupts._come
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) != interrupts._come


def after_calls(words: list[str], last: int) -> tuple[int, int]:
    """(exit code, calls) of a run that gets SIGTERM at a number of calls of the project's functions (0: never)."""
    seen = 0

    def called(frame: FrameType, event: str, given: Any) -> None:
        nonlocal seen
        if event == "call" and "/align/" in frame.f_code.co_filename:
            seen += 1
            if seen == last:
                sys.settrace(None)  # the rest is as quick as ever
                os.kill(os.getpid(), signal.SIGTERM)

    sys.settrace(called)  # hears of functions that are written in Python alone, and of no line in them
    try:
        return main(words), seen
    finally:
        sys.settrace(None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A chain that was never stopped, and how many calls it makes."""
    out = tmp_path_factory.mktemp("whole")
    code, calls = after_calls(words_of(out), 0)
    assert code == 0
    return out / "n", calls


@pytest.mark.grid
@pytest.mark.parametrize("number", range(20))
def test_twenty_random_moments(number: int, whole: tuple[Path, int], tmp_path: Path) -> None:
    run, calls = whole
    assert after_calls(words_of(tmp_path), random.Random(number).randint(1, calls))[0] == 130
    assert main(words_of(tmp_path)) == 0
    same(tmp_path / "n", run)
