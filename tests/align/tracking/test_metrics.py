"""Metrics files survive kills and refuse what JSON cannot hold; progress stays off stdout."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from align.tracking.metrics import Metrics, read_metrics
from align.tracking.progress import Progress
from data_prep.core.errors import UserError


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "sft" / "metrics.jsonl", "sft")
    metrics.log(1, "train", {"loss": 2.5, "tokens": 128})
    metrics.log(1, "eval", {"loss": 2.25})
    assert read_metrics(metrics.path) == [
        {"stage": "sft", "step": 1, "split": "train", "loss": 2.5, "tokens": 128},
        {"stage": "sft", "step": 1, "split": "eval", "loss": 2.25},
    ]
    assert read_metrics(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_json_cannot_hold_are_refused(tmp_path: Path, value: float) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", "ppo")
    with pytest.raises(ValueError, match="ppo step 3: 'loss'"):
        metrics.log(3, "train", {"fine": 1.0, "loss": value})
    assert not metrics.path.exists()


def test_reserved_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step"):
        Metrics(tmp_path / "metrics.jsonl", "ppo").log(3, "train", {"step": 1.0})


def test_a_torn_row_is_ignored_then_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = '{"stage": "sft", "step": 1, "split": "train", "loss": 1.0}\n'
    path.write_text(whole + '{"stage": "sft", "st')
    assert len(read_metrics(path)) == 1
    Metrics(path, "sft").log(2, "train", {"loss": 0.5})
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert path.read_text().startswith(whole)


def test_a_broken_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: "):
        read_metrics(path)


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
    assert lines == ["ppo 2/8  30 s left", "ppo 4/8  20 s left", "ppo 4/8  20 s left"]


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
