"""Ensembles of reward models: what members say together, what is refused, and a run that holds the base once."""

from __future__ import annotations

import json

import pytest
import torch

from align.checkpoints.checkpoint import Checkpoint
from align.rl.signals.base import Said, Site, signal_of
from align.tracking.metrics import read_metrics
from data_prep.core.errors import UserError
from data_prep.options import DataOptions
from tests.tiny_chain import finished, made, pipeline_words, read, refused, run

WHERE = "stages.ppo.reward"


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("by", "expected"), [("mean", [1.0, 0.5]), ("min", [0.0, 0.0]), ("mean_minus_std", [0.0, 0.0])]
)
def test_members_are_brought_to_their_own_norm_and_then_taken_together(by, expected):
    """By hand: the first member says 0 and 1 after its norm, the second 2 and 0."""
    signal = signal_of({"ensemble": ["a", "b"], "by": by}, WHERE)
    site = Site(DataOptions(), norms=[{"mean": 1.0, "std": 1.0}, {"mean": -4.0, "std": 2.0}])
    said = Said([], [], [], torch.tensor([[1.0, 0.0], [2.0, -4.0]]))
    assert [one["score"] for one in signal.source.open(WHERE, site)(said)] == expected
    assert not signal.measured and signal.source.norm(site) == (0, 1)


@pytest.mark.parametrize("members", [[], ["a"], ["a", "a"], ["a", "base"]])
def test_fewer_than_two_reward_models_are_none(members):
    with pytest.raises(UserError, match="an ensemble is two or more different reward models"):
        signal_of({"ensemble": members}, WHERE)


def test_members_stand_on_one_base_and_among_the_parents(tmp_path, capfd):
    start = finished() / "sft"
    other = made("reward_model", f"stages.reward_model.init={start}", "seed=1", "name=other", out=tmp_path)
    members = [finished() / "reward_model", other / "reward_model"]
    reward = f"{{ensemble: [{members[0]}, {members[1]}], by: min}}"
    words = [f"stages.ppo.{word}" for word in ("critic_warmup=0", "max_approx_kl=9", f"init={start}", "updates=1")]
    folder = made("ppo", *words, f"stages.ppo.reward={reward}", "name=e", out=tmp_path)
    saved = Checkpoint.open(folder / "ppo")
    rewards = [parent.digest for parent in saved.parents() if parent.role == "reward"]
    assert rewards == [Checkpoint.open(member).digest for member in members]
    assert {*rewards} <= {one.digest for one in saved.ancestors()}
    assert all(check["ok"] for check in saved.verify())
    stage = read(folder / "run.json")["stages"][0]
    assert stage["metrics"]["memory"]["bases"] == 1 and stage["metrics"]["step0"]["reward_parity"] < 1e-4
    row = next(iter(read_metrics(folder / "ppo" / "metrics.jsonl")))
    assert "signal/ensemble" in row
    line = refused(*run(capfd, *pipeline_words("ppo", *words, f"stages.ppo.reward={{ensemble: [{members[0]}, x/y]}}")))
    assert "no run or checkpoint 'x/y'" in line


def test_members_by_number_are_trained_on_the_same_rows_from_other_draws(tmp_path):
    folder = made("rlhf", "stages.ppo.reward={ensemble: 2, by: min}", "name=e", out=tmp_path, without="evaluate")
    members = [folder / "reward_model", folder / "reward_model_seed1"]
    saved = [Checkpoint.open(member) for member in members]
    rewards = [parent.digest for parent in Checkpoint.open(folder / "ppo").parents() if parent.role == "reward"]
    assert rewards == [one.digest for one in saved]
    assert [one.record["seed"] for one in saved] == [0, 1]
    weights = [one.record["files"]["adapter_model.safetensors"] for one in saved]
    alone = Checkpoint.open(finished() / "reward_model").record["files"]["adapter_model.safetensors"]
    assert weights[0] == alone != weights[1], "the first is the reward model that a chain without an ensemble trains"
    cards = [read(member / "data_card.json") for member in members]
    assert cards[0] == cards[1]
    pairs = [[row["id"] for row in read_lines(member / "samples.jsonl")] for member in members]
    assert pairs[0] == pairs[1], "held out are the same"
