"""The campaign of `benchmarks/gpu.py` at a tiny size on a CPU, so that it works at the first try on a card."""

from __future__ import annotations

import json

from benchmarks import gpu

LEFT_OUT = {"chain", "peer-sft-1b", "peer-sft-8b", "sft-1b", "gaps-1b-bf16"}
"""The chain is what tests run everywhere; TRL takes its time to be imported; at the tiny size the last two are `sft-8b`
and nearly `gaps-1b-fp32`."""


def test_every_part_works_and_is_kept(tmp_path, capsys):
    parts = [name for name in gpu.PARTS if name not in LEFT_OUT]
    words = ["--dry", "--out", str(tmp_path), "--parts", *parts]
    assert gpu.main(words) == 0, capsys.readouterr().out
    found = json.loads(capsys.readouterr().out)["parts"]
    assert all(found[name]["tokens_per_second"] > 0 for name in ("sft-8b", "sft-8b-nf4", "rollout-8b"))
    assert found["ppo-8b-bf16"]["pairs_per_second"] > 0
    assert found["saving-1b-bf16"]["reload_gap"] == 0.0
    for cut in ("as the stage cuts them", "one row a pass"):
        assert found["gaps-1b-fp32"][cut]["ratio_dev"] <= 1e-5
    assert gpu.main([*words, "--seconds", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"] == found, "parts that are done are read, not run again"


def test_a_part_that_fails_says_why_and_the_others_run(tmp_path, capsys, monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: no\nkernel")

    monkeypatch.setitem(gpu.PARTS, "sft-1b", (broken, "1b", gpu.Load.bf16))
    assert gpu.main(["--dry", "--out", str(tmp_path), "--parts", "sft-1b", "saving-1b-bf16"]) == 1
    found = json.loads(capsys.readouterr().out)["parts"]
    assert (
        found["sft-1b"]["error"] == "RuntimeError: CUDA error: no kernel" and found["saving-1b-bf16"]["merge_gap"] < 0.1
    )
