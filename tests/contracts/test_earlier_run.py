"""A run that an earlier version left: verified, talked to, exported, evaluated further.

`earlier_run/` was made by version 98c8d67 on the embedded base, whose weights are the same everywhere; its report and
the replies of its evaluation were left out. Its own command trains its stages anew, since results have changed
(`align/runs/record.py:_CODE_VERSION`).
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


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the run, as its user has it."""
    return Path(shutil.copytree(FOLDER, tmp_path / "tiny"))


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
