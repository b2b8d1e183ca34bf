"""The table of objectives over several runs, and how many replies a stage has sampled."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks import defaults


@pytest.fixture
def objectives(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(defaults.__file__).parent))
    return import_module("objectives")


def test_runs_are_told_from_overrides_and_their_median_is_shown(objectives, tmp_path, monkeypatch, capsys):
    for number in range(3):
        (tmp_path / f"q{number}" / "evaluate").mkdir(parents=True)
        (tmp_path / f"q{number}" / "evaluate" / "samples.jsonl").touch()
    asked = []

    def measured(folder: Path, only: list[str], words: list[str]) -> dict[str, dict[str, float]]:
        asked.append((folder, only, words))
        gold = [0.5, 0.7, 0.4][int(folder.name[1:])]
        own = {"gold": gold, "topic": 0.9, "KL": 1.0, "replies": 7040.0, "seconds": 60 * gold, "peak-MiB": 800.0}
        return {"sft": {"gold": 0.1, "topic": 1.0, "KL": 0.0}, "rloo": {**own, "trained": 12000.0}}

    monkeypatch.setattr(objectives, "measured", measured)
    words = ["q0", "q1", "q2", "stages.ppo.updates=9", "--out", str(tmp_path), "--only", "rloo"]
    monkeypatch.setattr(sys, "argv", ["objectives", *words])
    objectives.main()
    assert asked == [(tmp_path / f"q{number}", ["rloo"], ["stages.ppo.updates=9"]) for number in range(3)]
    assert capsys.readouterr().out.splitlines()[2:4] == [
        "| sft | 0.100 (0.100 to 0.100) | 1.000 | 0.00 | - | - | - | - |",
        "| rloo | 0.500 (0.400 to 0.700) | 0.900 | 1.00 | 7,040 | 30 | 800 | 12,000 |",
    ]


@pytest.mark.parametrize(("recipe", "count"), [("updates: 9\nbatch_size: 16\n", 48), ("batch_size: 16\n", 0)])
def test_replies_are_those_of_the_updates_that_were_made(recipe, count, objectives, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe)
    splits = ["eval", "train", "train", "train"]
    rows = [json.dumps({"step": step, "split": split}) + "\n" for step, split in enumerate(splits)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    assert objectives.sampled(tmp_path) == count
