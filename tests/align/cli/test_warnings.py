"""How a run ends: its verdict, what is worth a second look, and with --strict exit code 2."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from align import pipeline
from align.cli import dispatch as cli
from tests.run_folder import fake_run, write
from tests.tiny_chain import made, sft

WARNING = {"code": "alarm", "message": "the KL rose for 10 updates", "hint": "set kl_target=6", "stage": "ppo"}


@pytest.fixture
def ends_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """The warnings with which a run ends that trains nothing."""
    warnings: list[dict[str, Any]] = []
    run = fake_run(tmp_path)

    def fake(config: Any, shared: Any = None) -> dict[str, Any]:
        write(run / "run.json", {**json.loads((run / "run.json").read_text()), "warnings": warnings})
        return {"status": "done", "name": run.name, "warnings": warnings}

    monkeypatch.setattr(pipeline, "run", fake)
    monkeypatch.chdir(tmp_path)
    return warnings


def ran(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capfd.readouterr()
    code = cli.main(["run", "pipeline=sft", "out=.", "name=rlhf-1a2b3c4d", *words])
    return code, *capfd.readouterr()


def test_warnings_stand_at_the_end_and_strict_fails_on_them(
    ends_with: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = ran(capfd, "--strict")
    assert code == 0 and "Worth a second look" not in out and "strict" not in err
    ends_with.append(WARNING)
    code, out, err = ran(capfd)
    assert code == 0
    assert "\nWorth a second look:\n  - ppo: the KL rose for 10 updates; set kl_target=6.\n" in out
    code, out, err = ran(capfd, "--strict")
    assert code == 2 and "Worth a second look" in out
    assert err.splitlines()[-1] == "align: --strict: 1 warning; what was made stays"
    code, out, _ = ran(capfd, "--strict", "--json")
    assert code == 2 and json.loads(out)["warnings"] == [WARNING]


def test_check_is_strict_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["check", *sft(tmp_path, "stages.sft.lr=10")]
    assert cli.main(words) == 0
    assert "the usual learning rate" in capfd.readouterr().out
    assert cli.main([*words, "--strict"]) == 2


def test_a_sweep_is_strict_over_its_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from align.sweeps import sweep

    def fake(words: list[str], config_dir: str | None) -> tuple[int, dict[str, Any]]:
        return 0, {"dir": str(tmp_path)}

    monkeypatch.setattr(sweep, "sweep", fake)
    for number, warnings in enumerate(([], [WARNING])):
        write(tmp_path / "jobs" / str(number) / "run.json", {"warnings": warnings})
    assert cli.main(["run", "-m", "seed=1,2"]) == 0
    assert cli.main(["run", "-m", "seed=1,2", "--strict"]) == 2
    assert "--strict: 1 warning" in capfd.readouterr().err


def test_eval_ends_with_a_verdict(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = made("sft", "name=n", out=tmp_path)
    words = ["eval", str(run / "sft"), f"out={tmp_path}", "name=e", "stages.evaluate.prompts=2"]
    capfd.readouterr()
    assert cli.main(words) == 0
    out = capfd.readouterr().out
    assert out.index("Held-out loss went from ") < out.index("Nothing judged the replies") < out.index("report: ")
    assert cli.main([*words, "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer["verdict"]["headline"].startswith("Held-out loss went from ")
    assert [warning["code"] for warning in answer["warnings"]] == ["replies_cut"]


def test_the_last_lines_lead_on_and_know_whose_data_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert cli.main(["run", *sft(tmp_path), "name=it's n"]) == 0
    out = capfd.readouterr().out
    target = shlex.quote("it's n/sft")
    for verb in ("chat", "merge", "export", "lineage"):
        assert f" {verb} {target} out={tmp_path}\n" in out, "as a shell takes it"
    assert "your own data" not in out, "it was the user's own already"
