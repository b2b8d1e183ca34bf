"""The gate of a reward model: measured where it is trained, heeded where PPO begins, shown in the evaluation."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import reward.gate
from align.config.compose import compose
from align.config.schema import RewardGate
from align.rl.reward_gate import heed
from data_prep.core.errors import UserError
from tests.tiny_chain import execute, finished, made, pipeline_words, read

BAD = {"verdict": "refuse", "reasons": ["it likes blanks; try more pairs", "it is slow; try less"]}
DOUBT = {"verdict": "warn", "reasons": ["it is unsure; try more pairs"]}


def say(code: str, message: str, hint: str | None = None) -> None:
    print(f"ppo: warning: {message}; {hint}", file=sys.stderr)


def context(wanted: RewardGate, gate: dict[str, Any] | None) -> Any:
    metrics = {"accuracy": 0.9, **({"gate": gate} if gate else {})}
    return SimpleNamespace(
        reward=SimpleNamespace(record={"metrics": metrics}, folder=Path("RUN/reward_model")),
        config=SimpleNamespace(reward_gate=wanted),
        spec=SimpleNamespace(name="ppo"),
        is_main=True,
        staging=Path("OTHER/.staging-ppo"),
        warn=say,
    )


def test_strict_stops_at_refuse_and_at_nothing_known() -> None:
    with pytest.raises(UserError, match="not fit for PPO: it likes blanks; try more pairs") as caught:
        heed(context(RewardGate.strict, BAD))
    assert caught.value.code == "reward_gate" and "reward_gate=warn" in str(caught.value.hint)
    with pytest.raises(UserError, match="made before there was a gate"):
        heed(context(RewardGate.strict, None))
    heed(context(RewardGate.strict, DOUBT))


@pytest.mark.parametrize(
    ("wanted", "gate", "lines"),
    [
        (RewardGate.warn, BAD, 2),
        (RewardGate.warn, DOUBT, 1),
        (RewardGate.strict, DOUBT, 1),
        (RewardGate.warn, {"verdict": "pass", "reasons": []}, 0),
        (RewardGate.warn, None, 0),
        (RewardGate.off, BAD, 0),
    ],
)
def test_what_is_said(wanted: RewardGate, gate: dict[str, Any] | None, lines: int, capsys: Any) -> None:
    heed(context(wanted, gate))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == lines
    assert not lines or said[0].startswith(
        f"ppo: warning: the gate of its reward model says {gate and gate['verdict']}: "
    )
    assert all("; try " in line for line in said)


def test_the_reasons_of_this_run_are_not_said_again(capsys: Any) -> None:
    own = context(RewardGate.warn, BAD)
    own.staging = Path("RUN/.staging-ppo")
    heed(own)
    assert capsys.readouterr().err == "ppo: the gate of its reward model says refuse\n"


def test_the_stage_measures_and_the_evaluation_shows_it() -> None:
    run = finished()
    record = read(run / "reward_model" / "checkpoint.json")["metrics"]
    assert set(record["by_kind"]) == {"given"} and record["by_kind"]["given"]["n"] == record["n"]
    assert {"off_topic", "truncated", "shuffled", "no_end"} <= set(record["probes"])
    assert record["gate"]["verdict"] in ("warn", "refuse") and record["gate"]["reasons"], "eight pairs judge it"
    judged = read(run / "evaluate" / "result.json")["reward_model"]
    assert judged["gate"] == record["gate"] and judged["by_kind"] == record["by_kind"]
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "the pairs of the data" in html and "Fit for PPO" in html and "the chosen reply of another prompt" in html


def test_kinds_of_negatives_are_told_apart(tmp_path: Path) -> None:
    words = ("data.preferences.negatives=[off_topic,{shuffled: 2}]", "name=n")
    run = made("reward_model", *words, out=tmp_path)
    kinds = read(run / "reward_model" / "checkpoint.json")["metrics"]["by_kind"]
    assert set(kinds) == {"given", "off_topic", "shuffled"}
    assert sum(one["n"] for one in kinds.values()) == read(run / "reward_model" / "checkpoint.json")["metrics"]["n"]
    card = read(run / "reward_model" / "data_card.json")
    assert card["negatives"]["shuffled"]["per_row"] == 2.0


def test_a_strict_run_trains_no_policy_on_a_refused_one(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(reward.gate, "gate", lambda metrics, std: BAD)
    words = pipeline_words("rlhf", "reward_gate=strict", "name=n", f"out={tmp_path}")
    with pytest.raises(UserError, match="not fit for PPO"):
        execute(compose(words))
    run = read(tmp_path / "n" / "run.json")
    assert [stage["status"] for stage in run["stages"]] == ["done", "done", "failed"] and run["status"] == "failed"


def test_the_gate_changes_no_name() -> None:
    names = {compose([*pipeline_words("rlhf"), f"reward_gate={word}"]).name for word in ("off", "warn", "strict")}
    assert len(names) == 1
    assert compose(pipeline_words("rlhf")).reward_gate is RewardGate.warn
