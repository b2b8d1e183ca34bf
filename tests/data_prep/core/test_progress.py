"""Tests for progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

import pytest

from data_prep.core.progress import Progress


def test_plain_progress_is_one_line_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("sft", 3) as progress:
        for step in range(3):
            progress.advance(loss=1.0 / (step + 1))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("sft 3/3  loss 0.3333  ")


def test_plain_progress_speaks_at_intervals(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Progress("ppo", 8) as progress:
        for _ in range(4):
            now[0] += 5.0
            progress.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["ppo 2/8  30 s left", "ppo 4/8  20 s left"]


def test_the_end_is_told_once_with_its_newest_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Progress("sft", 1) as progress:
        now[0] += 20.0
        progress.advance(loss=0.5)
    assert capsys.readouterr().err.splitlines() == ["sft 1/1  loss 0.5  20.0 s"]
    with Progress("sft", 1) as progress:
        now[0] += 20.0
        progress.advance(loss=0.5)
        progress.show(eval_loss=0.25)
    assert capsys.readouterr().err.splitlines() == [
        "sft 1/1  loss 0.5  20.0 s",
        "sft 1/1  loss 0.5 eval_loss 0.25  20.0 s",
    ]


def test_bar_on_a_terminal_writes_to_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("reward_model", 2) as progress:
        progress.advance(2, accuracy=0.75)
    out, err = capsys.readouterr()
    assert out == ""
    assert "2/2" in err


def test_numbers_may_be_shown_without_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("sft", 1) as progress:
        progress.show(eval_loss=0.5)
        progress.advance(loss=0.25)
    assert capsys.readouterr().err.startswith("sft 1/1  eval_loss 0.5 loss 0.25  ")


def test_disabled_progress_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("sft", 1, enabled=False) as progress:
        progress.advance(loss=1.0)
    assert capsys.readouterr() == ("", "")


def test_work_of_unknown_length_is_told_only_where_it_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Progress("data persona", None, unit="rows") as progress:
        progress.advance(100)
    assert capsys.readouterr().err == ""
    with Progress("data persona", None, unit="rows") as progress:
        for _ in range(3):
            now[0] += 5.0
            progress.advance(1000)
    assert capsys.readouterr().err.splitlines() == [
        "data persona: 2,000 rows, 200 rows/s",
        "data persona: 3,000 rows, 200 rows/s",
    ]
