"""A run that an earlier version left: taken up by the same command, verified, talked to, exported, evaluated further.

`earlier_run/` was made by version 98c8d67 with `COMMAND` on the embedded base, whose weights are the same everywhere;
its report and the replies of its evaluation were left out. What decides its digests may not change unless results do
(`align/runs/record.py:_CODE_VERSION`, `CODE_VERSION` when the run was made). PPO has other options since, so that it
is trained anew.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from align.cli.dispatch import main

FOLDER = Path(__file__).parent / "earlier_run"
COMMAND = json.loads((FOLDER / "run.json").read_text(encoding="utf-8"))["command"][2:]
CODE_VERSION = 2
SAME = ["sft", "reward_model"]
ANEW = ["ppo", "evaluate"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the run, as its user has it."""
    return Path(shutil.copytree(FOLDER, tmp_path / "tiny"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_command_trains_only_what_changed(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.runs.record._CODE_VERSION", CODE_VERSION)
    before = files(run)
    words = [f"out={run.parent}" if word.startswith("out=") else word for word in COMMAND]
    assert main(["run", *words]) == 0
    said = capfd.readouterr().err
    assert [f"{stage}: finished before, skipped" in said for stage in SAME] == [True] * 2, said
    assert [f"{stage}: done in" in said for stage in ANEW] == [True] * 2, said
    after = files(run)
    kept = [name for name in before if name.partition("/")[0] in SAME]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    record = json.loads(after["run.json"])
    assert [entry["skipped"] for entry in record["stages"]] == [True, True, False, False] and record["status"] == "done"


def test_it_is_whole(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run), "--json"]) == 0
    checks = json.loads(capfd.readouterr().out)
    assert checks["ok"] and len(checks["checks"]) > 10
    assert main(["lineage", f"{run}/ppo", "--json"]) == 0
    roles = {edge["role"] for edge in json.loads(capfd.readouterr().out)["edges"]}
    assert roles == {"init", "reward", "base"}


def test_it_speaks(run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\n")))
    assert main(["chat", str(run), "max_new_tokens=4"]) == 0
    assert capfd.readouterr().out.strip()


def test_it_is_exported(run: Path, tmp_path: Path) -> None:
    assert main(["export", f"{run}/ppo", f"to={tmp_path / 'peft'}"]) == 0
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (run / "ppo", tmp_path / "peft"))
    assert ours and ours.keys() == theirs.keys() and all(bool((theirs[key] == ours[key]).all()) for key in ours)
