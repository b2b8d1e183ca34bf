"""Warnings of a run: what is in its files, what a stage said of itself, what its checks say."""

from __future__ import annotations

import json
from pathlib import Path

from align.report.notices import told
from align.report.page import reported
from tests.run_folder import fake_run, write


def test_what_a_stage_warned_of_stands_in_the_list_and_on_the_page(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    assert reported(run)[1] == []
    rows = [
        {"code": "alarm", "message": "the KL rose for 10 updates", "hint": "set kl_target=6"},
        {"code": "bare", "message": "ppo's rewards are all equal", "hint": None},
    ]
    write(run / "ppo" / "warnings.jsonl", rows)
    path, warnings = reported(run)
    assert warnings == [{**row, "stage": "ppo"} for row in rows]
    html = path.read_text(encoding="utf-8")
    assert "<li>ppo: the KL rose for 10 updates; set kl_target=6.</li>" in html
    assert told(warnings[1]) == "ppo's rewards are all equal."


def test_a_failed_check_is_a_warning(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    (run / "sft" / "adapter_config.json").write_text("{}")
    found = [warning for warning in reported(run)[1] if warning["code"] == "failed_check"]
    assert {warning["stage"] for warning in found} == {"sft"}
    assert "Files have the bytes that were saved" in found[0]["message"]


def test_every_warning_of_the_numbers_has_a_code_a_hint_and_its_stage(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    held = [{"stage": "sft", "step": s, "split": "eval", "loss": v} for s, v in ((1, 2.0), (2, 1.0), (3, 1.5))]
    write(run / "sft" / "metrics.jsonl", held)
    late = [{"stage": "ppo", "step": 9, "split": "train", "value/explained_var": -1.0, "response/eos_rate": 0.5}]
    write(run / "ppo" / "metrics.jsonl", late)
    found = {warning["code"]: warning for warning in reported(run)[1]}
    assert {code: warning["stage"] for code, warning in found.items()} == {
        "loss_rose": "sft",
        "critic": "ppo",
        "replies_cut": "ppo",
    }
    assert all(warning["hint"] and not warning["message"].endswith(".") for warning in found.values())


def test_the_gate_is_one_warning_of_the_stage_that_trained_the_reward_model(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    reasons = ["it is blind; try more pairs", "it is slow; try less", "it is odd; try more"]
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    trained = next(stage for stage in record["stages"] if stage["name"] == "reward_model")
    trained["metrics"] |= {"ece": 0.01, "gate": {"verdict": "refuse", "reasons": reasons}}
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    path, warnings = reported(run)
    (found,) = (warning for warning in warnings if warning["code"] == "reward_gate")
    assert found["stage"] == trained["name"]
    assert found["message"] == "The reward model's gate says refuse: it is blind (and 2 more reasons)"
    assert found["hint"] == "try more pairs; report.html lists all"
    assert all(f">{reason}<" in path.read_text(encoding="utf-8") for reason in reasons)
