"""What a stage warns of: kept with its result, in run.json, said once, and carried over an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.stages import supervised
from align.training import resume
from align.training.resume import StateSaver
from tests.tiny_chain import made, read

WORDS = ["name=n", "stages.sft.max_steps=4", "stages.sft.save_minutes=1e-9", "data.conversations.eval_share=0"]


def warned(run: Path) -> list[tuple[str, str]]:
    return [(warning["stage"], warning["code"]) for warning in read(run / "run.json")["warnings"]]


def test_warnings_of_a_stage_outlive_it_and_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    original, offer = supervised.greedy_samples, StateSaver.offer

    def samples(context: Any, *given: Any) -> Any:
        for _ in range(2):
            context.warn("late", "the samples are short")
        return original(context, *given)

    def stopped(self: StateSaver, updater: Any, step: int, more: dict[str, Any]) -> None:
        place = self.staging / "warnings.jsonl"
        if step == 1:
            place.write_text('{"code": "early", "message": "two rows are odd", "hint": "look at them"}\n')
        if step == 3:
            place.write_text(place.read_text() + '{"code": "gone", "message": "after the state", "hint": null}\n')
            raise KeyboardInterrupt
        offer(self, updater, step, more)

    monkeypatch.setattr(supervised, "greedy_samples", samples)
    monkeypatch.setattr(resume, "_SHARE", 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StateSaver, "offer", stopped)
        made("sft", *WORDS, out=tmp_path)
    assert warned(tmp_path / "n") == [("sft", "early"), ("sft", "gone")], "what a stopped run had said"
    made("sft", *WORDS, out=tmp_path)
    assert warned(tmp_path / "n") == [("sft", "early"), ("sft", "late")], "what came after the state is said anew"
    assert capfd.readouterr().err.count("sft: warning: the samples are short\n") == 1
    made("sft", *WORDS, out=tmp_path)
    assert read(tmp_path / "n" / "run.json")["stages"][0]["skipped"]
    assert warned(tmp_path / "n") == [("sft", "early"), ("sft", "late")], "a stage that is skipped warns as before"
