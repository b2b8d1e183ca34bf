"""Metrics files survive kills and refuse what JSON cannot hold; progress stays off stdout."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.tracking.metrics import Metrics, read_metrics
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
