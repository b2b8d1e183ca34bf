"""Which method is recommended: by the tables that the documents show, by what fits, and never by a guess."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from align.cli import dispatch as cli
from align.config.registries import adapters
from align.planning import recommend
from align.planning.recommend import BEYOND, Goal, candidates
from align.report.formatting import number
from tests.tiny_chain import base, data_words

ROOT = Path(__file__).resolve().parents[3]
KEPT = json.loads((ROOT / "align/planning/measured.json").read_text("utf-8"))
MINI = KEPT["mini"]["parameters"]


@pytest.mark.parametrize("name", KEPT)
def test_it_reads_what_the_documents_show(name: str) -> None:
    page = (ROOT / "docs/adapters.md").read_text("utf-8")
    found = re.search(rf"<!-- measured: {name} -->(.*?)<!-- end -->", page, re.DOTALL)
    assert found is not None
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in found[1].splitlines() if "| `" in line]
    rows = {line[0].strip("`"): line for line in lines if len(line) == 9 and line[0] != "method"}
    assert rows.keys() == KEPT[name]["methods"].keys()
    for method, row in KEPT[name]["methods"].items():
        line = rows[method]
        assert (f"{row['loss']:.4f}", row["saved"], f"{row['speed']:.2f}") == (line[2], line[5], line[8])
    assert rows["full"][3] == number(KEPT[name]["parameters"])


def test_each_goal_has_its_order() -> None:
    rows = KEPT["mini"]["methods"]
    loss = [rows[each.method]["loss"] for each in candidates(Goal.quality, MINI)]
    assert loss == sorted(loss) and len(loss) == len(rows)
    speed = [rows[each.method]["speed"] for each in candidates(Goal.speed, MINI)]
    assert speed == sorted(speed, reverse=True)
    smallest = candidates(Goal.size, MINI)
    assert smallest[0].method == "vera", "prompt and ia3 save less, and are far from LoRA's loss"
    for goal in (Goal.speed, Goal.size):
        assert max(rows[each.method]["loss"] for each in candidates(goal, MINI)) <= 1.15 * rows["lora"]["loss"]
    why = candidates(Goal.quality, MINI)[0].why
    assert why.startswith("measured on a base of 3,221,952 parameters: held-out loss 1.0909, place 1 of 13")
    assert "1,578,400 parameters: held-out loss 0.1382" in candidates(Goal.quality, 1_600_000)[0].why


def test_nothing_is_guessed_beyond_what_was_measured() -> None:
    for goal in Goal:
        assert [each.method for each in candidates(goal, int(MINI * BEYOND))] != ["lora", "qlora"]
        far = candidates(goal, int(MINI * BEYOND) + 1)
        assert [each.method for each in far] == ["lora", "qlora"]
        assert all("no method was measured on a base of 32,219,521 parameters" in each.why for each in far)
    assert set(KEPT["mini"]["methods"]) <= set(adapters.names())


def test_the_first_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A device on which the first two do not fit, the second not even with its changes."""
    room = 100

    class Needs:
        def __init__(self, peak: int, changes: list[dict[str, Any]]) -> None:
            self.memory, self.changes = type("M", (), {"peak_bytes": peak, "high": peak})(), changes

    takes = {
        "full": Needs(300, []),
        "delta_lora": Needs(200, [{"set": "stages.sft.micro_tokens=64", "fits": False}]),
        "lora": Needs(150, [{"set": "a=1", "fits": False}, {"set": "stages.sft.micro_tokens=64", "fits": True}]),
    }
    seen = []

    def plan(config: Any, device: Any) -> Any:
        seen.append(config.stages[0].adapter.method)
        return iter([("sft", takes[seen[-1]])])

    monkeypatch.setattr(recommend, "plan", plan)
    monkeypatch.setattr("align.planning.devices.GPUS", {"small": room / 2**30})
    words = ["pipeline=sft", "model=hf", f"model.path={base()}", *data_words(), "device=small"]
    assert cli.main(["recommend", *words]) == 0
    out = capsys.readouterr().out
    assert seen == ["full", "delta_lora", "lora"] and "not full: " in out
    assert out.rstrip().endswith("adapter=lora stages.sft.micro_tokens=64")
    takes["lora"] = Needs(150, [])
    monkeypatch.setattr(recommend, "candidates", lambda goal, parameters: candidates(goal, parameters)[:3])
    assert cli.main(["recommend", *words]) == 2
    assert "no method that is known to be good here fits small" in capsys.readouterr().err


def test_what_it_does_not_take(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recommend", "adapter=lora"]) == 2
    assert "is what recommend looks for" in capsys.readouterr().err
    assert cli.main(["recommend", "goal=quallity"]) == 2
    assert "did you mean 'quality'?" in capsys.readouterr().err
