"""Stages whose lower blocks are not trained: with a trunk cache they come to what they come to without, and say so."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from align.cli.dispatch import main
from align.models.trunk import TrunkCache
from align.tracking.metrics import read_metrics
from tests.tiny_chain import HOME, made, pipeline_words, read

TOP = ["adapter.layers=top_1", "stages.sft.batch_size=32", "stages.reward_model.batch_size=32"]
"""Two steps over 32 rows are two epochs."""
OFF = [f"stages.{stage}.trunk_cache=0" for stage in ("sft", "reward_model", "ppo")]
WARNED = "no_trunk_cache"


@cache
def chain(*more: str) -> Path:
    """A run of SFT, reward model and PPO; of a kind that trains the upper of two blocks alone."""
    return made("rlhf", "name=" + "-".join(["trunk", *(word.partition("=")[2] for word in more)]), *TOP, *more)


def numbers(run: Path, stage: str) -> list[dict[str, float]]:
    rows = read_metrics(run / stage / "metrics.jsonl")
    return [{name: value for name, value in row.items() if isinstance(value, float)} for row in rows]


def said(capfd: Any) -> list[str]:
    return [line for line in capfd.readouterr().err.splitlines() if "computed once a row" in line]


def test_a_chain_says_the_same_numbers_with_and_without_it(capfd):
    cached = made("rlhf", "name=trunk-told", *TOP)
    told = said(capfd)
    assert told == [
        "sft: 1 of 2 blocks are computed once a row, for policy",
        "reward_model: 1 of 2 blocks are computed once a row, for reward",
        "ppo: 1 of 2 blocks are computed once a row, for policy, reference, reward, value",
    ]
    plain = made("rlhf", "name=trunk-off", *TOP, *OFF)
    assert said(capfd) == []
    for stage in ("sft", "reward_model", "ppo"):
        ours, theirs = numbers(cached, stage), numbers(plain, stage)
        assert len(ours) == len(theirs) and ours
        for one, other in zip(ours, theirs, strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-4), (stage, one, other)
    assert not any(row["code"] == WARNED for row in read(cached / "run.json")["warnings"])


def test_room_decides_no_bit_and_is_no_reason_to_train_again(capfd):
    small = made("sft", "name=small", *TOP[:2], "stages.sft.trunk_cache=1e-5")
    (warned,) = [row for row in read(small / "run.json")["warnings"] if row["code"] == "trunk_cache_full"]
    assert "1e-05 GB" in warned["message"] and warned["hint"] == "raise stages.sft.trunk_cache"
    ours, theirs = ((run / "sft" / "adapter_model.safetensors").read_bytes() for run in (small, chain()))
    assert ours == theirs
    capfd.readouterr()
    made("sft", "name=small", *TOP[:2])
    assert read(small / "run.json")["stages"][0]["skipped"] is True
    made("sft", "name=small", *TOP[:2], "stages.sft.trunk_cache=0")
    assert read(small / "run.json")["stages"][0]["skipped"] is False


def test_an_update_begins_with_an_empty_cache(monkeypatch):
    used: list[int] = []
    clear = TrunkCache.clear
    ppo = ["init=" + str(chain() / "sft"), "reward=" + str(chain() / "reward_model")]
    monkeypatch.setattr(TrunkCache, "clear", lambda self: (used.append(self.used), clear(self))[1])
    made("ppo", "name=alone", TOP[0], *(f"stages.ppo.{word}" for word in [*ppo, "updates=3", "monitor=off"]))
    assert len(used) == 3 and 0 < used[2] < 1.5 * used[1]


@pytest.mark.parametrize(
    ("words", "warned"),
    [
        (["stages.sft.neftune=5"], "noise on embeddings"),
        (["stages.sft.neftune=5", "stages.sft.trunk_cache=0"], None),
        (["stages.sft.neftune=5", "stages.sft.batch_size=8"], None),  # every row comes once
        (["stages.sft.neftune=5", "adapter.layers=all"], None),
    ],
)
def test_it_says_why_it_is_not_there(words, warned, capfd):
    run = made("sft", "name=" + str(abs(hash(tuple(words)))), *TOP[:2], *words)
    assert said(capfd) == []
    found = [row["message"] for row in read(run / "run.json")["warnings"] if row["code"] == WARNED]
    assert len(found) == (warned is not None)
    assert warned is None or warned in found[0]


def test_a_disagreement_is_told_and_all_blocks_are_computed(monkeypatch):
    monkeypatch.setattr("align.models.trunk._disagreement", lambda tree: "hidden states differ by 1 from those of all")
    run = made("sft", "name=differs", *TOP[:2])
    (found,) = [row for row in read(run / "run.json")["warnings"] if row["code"] == WARNED]
    assert found["message"].startswith("every pass computes all blocks: with the trunk cache, hidden states differ")
    assert found["hint"] == "set stages.sft.trunk_cache=0 to leave this warning out"


def test_a_plan_counts_it(capfd):
    def kept(*words: str) -> int:
        capfd.readouterr()
        assert main(["plan", *pipeline_words("sft", f"out={HOME}", "device=cpu", *words), "--json"]) == 0
        return json.loads(capfd.readouterr().out)["stages"]["sft"]["parts"].get("trunk cache", 0)

    tokens = kept(*TOP[:2]) / (32 * 4)  # width 32, float32
    assert tokens > 0 and tokens % 1 == 0
    assert kept(*TOP[:2], "stages.sft.trunk_cache=1e-6") == 1000
    assert kept(*TOP[:2], "stages.sft.trunk_cache=0") == kept(TOP[1]) == kept(TOP[0], "stages.sft.batch_size=8") == 0
