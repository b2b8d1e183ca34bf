"""Rules as rewards: what the sum is, what is refused, and a policy that learns from a rule without a reward model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from align.checkpoints.checkpoint import Checkpoint
from align.cli.dispatch import main
from align.inference.generation import Reply
from align.rl.experience import Rollout
from align.rl.signals.base import Site, signals_of
from align.rl.signals.weighed import Signals
from align.tracking.metrics import read_metrics
from align.training import resume
from data_prep.core.errors import TrainingStopped
from data_prep.options import DataOptions
from data_prep.types import PromptTokens
from reward.rules.repetition import Repetition
from tests.align.training.test_resume import OFTEN, both, contents, entry
from tests.tiny_chain import finished, made, pipeline_words, read, refused, run

WHERE = "stages.ppo.reward"
VOWEL = "[aeiou]"
"""Nearly every other reply of the tiny model has one."""


def words_of(*more: str) -> list[str]:
    return [f"stages.ppo.{word}" for word in more]


def of_rules(out: Path, reward: str, *more: str) -> Path:
    """A short PPO run without a reward model on the finished chain's policy."""
    short = ["critic_warmup=0", "max_approx_kl=9", *more]
    own = [word if word.startswith(("data", "name")) else f"stages.ppo.{word}" for word in short]
    return made("ppo", f"stages.ppo.init={finished() / 'sft'}", f"stages.ppo.reward={reward}", *own, out=out)


def rows_of(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder / "ppo" / "metrics.jsonl") if row["split"] == split]


def rollout(*texts: str) -> tuple[Rollout, Any]:
    """Replies whose ids are the places of their texts, and what reads them."""
    prompts = [PromptTokens([1], "?", f"f.jsonl:{i}", {"ground_truth": "a"}) for i, _ in enumerate(texts, 1)]
    return Rollout(prompts, [Reply([i], [0.0], True) for i in range(len(texts))]), lambda ids: texts[ids[0]]


def built(value: Any, *texts: str, norm: dict[str, float] | None = None) -> tuple[Signals, Rollout]:
    listed = signals_of(value, WHERE)
    said, decode = rollout(*texts)
    return Signals(listed, Site(DataOptions(), norms=[norm] if norm else []), decode), said


# ---------------------------------------- the sum
def test_signals_are_normalised_clipped_weighed_and_added():
    """By hand: 2 x exact + 0.5 x length - (model - 1) / 2 clipped to 1."""
    value = [
        {"rule": "exact_answer", "weight": 2},
        {"rule": "length", "target": 2, "weight": 0.5},
        {"checkpoint": "reward_model", "weight": -1, "clip": 1},
    ]
    signals, said = built(value, "a", "a b", norm={"mean": 1.0, "std": 2.0})
    scores = signals.scores(said.prompts, said.replies, torch.tensor([[2.0], [9.0]]))
    assert {name: each.tolist() for name, each in scores.items()} == {
        "exact_answer": [1, 0],
        "length": [0.5, 1],
        "reward_model": [2, 9],
    }
    assert signals.total(scores).tolist() == [2 + 0.25 - 0.5, 0.5 - 1]


def test_running_statistics_are_those_of_all_scores_so_far_and_looks_keep_the_first():
    value = [{"rule": "length", "target": 4, "normalise": "running"}]
    signals, _ = built(value)
    first, second = ({"length": torch.tensor(x, dtype=torch.float64)} for x in ([0.25, 0.5, 0.75], [1.0, 1.0, 0.0]))
    signals.begin(first)
    look = signals.at_start()
    signals.learn(second, lambda sums: sums)
    every = torch.tensor([0.25, 0.5, 0.75, 1.0, 1.0, 0.0], dtype=torch.float64)
    wanted = (second["length"] - every.mean()) / every.std(unbiased=False)
    assert torch.allclose(signals.total(second).double(), wanted, atol=1e-6)
    start = first["length"].double()
    assert torch.allclose(look.total(first).double(), (start - 0.5) / start.std(unbiased=False), atol=1e-6)
    again, _ = built(value, "a")
    again.restore(json.loads(json.dumps(signals.state())))
    assert torch.equal(again.total(second), signals.total(second))


def test_scores_without_a_deviation_keep_their_scale():
    signals, said = built([{"rule": "exact_answer", "normalise": "start"}], "b", "c")
    scores = signals.scores(said.prompts, said.replies, torch.zeros(2, 0))
    signals.begin(scores)
    assert signals.total({"exact_answer": torch.tensor([0.0, 1.0])}).tolist() == [0, 1]


# ---------------------------------------- what is refused
@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("[]", "stages.ppo.reward: an empty list rewards nothing"),
        ("[7]", "stages.ppo.reward[0]: expected a signal {rule: NAME} (got 7)"),
        ("{rule: exact_anser}", "did you mean 'exact_answer'"),
        ("{rule: length}", "stages.ppo.reward: the rule length lacks target"),
        ("{rule: length, target: long}", "stages.ppo.reward.target: expected a whole number"),
        ("{rule: length, target: 0}", "a length of at least 1 is needed"),
        ("{rule: length, target: 3, wieght: 2}", "option of the rule length 'wieght'"),
        ("{rule: length, target: 3, weight: much}", "stages.ppo.reward.weight: expected a number"),
        ("{rule: length, target: 3, checkpoint: reward_model}", "a signal is one of checkpoint, classifier, "),
        ("{weight: 2}", "(got none); give it rule=NAME"),
        ("[{rule: length, target: 3}, {rule: length, target: 4}]", "two signals are called length"),
        ("[reward_model, {checkpoint: reward_model, name: b}]", "more than one reward model"),
        ("{checkpoint: reward_model, target: 3}", "stages.ppo.reward.target: unknown option"),
        ("{rule: pattern, pattern: '['}", "no regular expression"),
        ("{rule: forbidden, texts: []}", "at least one text is needed"),
        ("{rule: known_reply}", "the rule known_reply lacks topic"),
        (
            "{rule: exact_answer}",
            "ground_truth: the rule exact_answer needs the right answer of every prompt",
        ),
    ],
)
def test_what_cannot_be_a_signal_is_one_line(tmp_path, capfd, reward, said):
    words = pipeline_words("ppo", f"stages.ppo.init={finished() / 'sft'}", f"stages.ppo.reward={reward}")
    line = refused(*run(capfd, *words, "stages.ppo.critic_warmup=0", f"out={tmp_path}"))
    assert said in line


def test_check_names_a_row_without_its_answer_and_a_rule_without_its_option(tmp_path, capsys):
    start = [f"stages.ppo.init={finished() / 'sft'}", "stages.ppo.critic_warmup=0", f"out={tmp_path}"]
    for reward, said in (("{rule: number}", "needs the right answer"), ("{rule: length}", "lacks target")):
        assert main(["check", *pipeline_words("ppo", *start, f"stages.ppo.reward={reward}")]) == 2
        assert said in capsys.readouterr().out


def test_a_saved_critic_belongs_to_a_reward_model(tmp_path, capfd):
    words = pipeline_words("ppo", f"stages.ppo.init={finished() / 'ppo'}", "stages.ppo.reward={rule: repetition}")
    line = refused(*run(capfd, *words, "stages.ppo.critic=parent", f"out={tmp_path}"))
    assert "a saved critic belongs to a reward model" in line


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda *_: {"score": float("nan")}, "gave no finite score to the reply to f.jsonl:1"),
        (lambda *_: {"sore": 1.0}, "gave no finite score to the reply to f.jsonl:1"),
        (lambda *_: 1 / 0, "failed on the reply to f.jsonl:1: ZeroDivisionError"),
        (lambda *_: None, "failed on the reply to f.jsonl:1: AttributeError"),
    ],
)
def test_a_rule_that_fails_is_named_with_its_row(score, message, monkeypatch):
    signals, said = built({"rule": "repetition"}, "a", "b")
    monkeypatch.setattr(Repetition, "score", lambda self, *said: score(*said))
    with pytest.raises(TrainingStopped, match="the rule repetition " + message):
        signals.scores(said.prompts, said.replies, torch.zeros(2, 0))


# ---------------------------------------- runs
def test_a_policy_learns_a_rule_without_a_reward_model(tmp_path):
    """Two roles on the base, no reward among the parents, and the rewarded sign comes."""
    reward = f"[{{rule: pattern, pattern: '{VOWEL}', whole: false}}, {{rule: length, target: 1, weight: 0}}]"
    words = ["advantage=rloo", "updates=12", "batch_size=32", "lr=2e-2", "kl_coef=0", "kl_limit=1e9", "ppo_epochs=1"]
    words += ["adapter=full", "on_parent=merge", "missing_eos_penalty=0", "name=r"]
    folder = of_rules(tmp_path, reward, *words)
    rows = rows_of(folder)
    early, late = (sum(row["signal/pattern"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    assert late > early + 0.3, (early, late)
    assert all(row["objective/score"] == pytest.approx(row["signal/pattern"]) for row in rows)
    looks = rows_of(folder, "eval")
    assert all("signal/length" in row for row in looks)
    stage = read(folder / "run.json")["stages"][0]
    assert [parent["role"] for parent in stage["parents"]] == ["init"]
    assert stage["metrics"]["reference_unchanged"] and "reward_parity" not in stage["metrics"]["step0"]
    assert stage["metrics"]["memory"]["ratio"] < 2 and stage["metrics"]["step0"]["grad_roles"] == ["policy"]
    assert Checkpoint.open(folder / "ppo").parent("reward") is None and not (folder / "ppo" / "value").exists()
    assert "ppo" in (folder / "report.html").read_text(encoding="utf-8")


def test_with_a_critic_it_stands_on_the_parent_and_rules_stand_beside_a_reward_model(tmp_path):
    folder = of_rules(tmp_path, "{rule: repetition, words: 1}", "name=c")
    critic = Checkpoint.open(folder / "ppo" / "value")
    assert critic.parent("init").digest == Checkpoint.open(finished() / "sft").digest
    both = f"[{finished() / 'reward_model'}, {{rule: repetition, words: 1, normalise: start}}]"
    folder = of_rules(tmp_path, both, "name=b", "advantage=reinforce_pp")
    assert {"signal/reward_model", "signal/repetition"} <= rows_of(folder)[0].keys()
    assert Checkpoint.open(folder / "ppo").parent("reward") is not None


def test_it_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    """With running statistics and averaged weights, which are a part of the state, and with conversations mixed in."""
    reward = "{rule: repetition, words: 1, normalise: running}"
    words = ["name=n", *(f"stages.ppo.{word}" for word in ("updates=4", "critic_warmup=0", OFTEN, f"reward={reward}"))]
    words += ["stages.ppo.ema_decay=0.5", "stages.ppo.ptx_coef=0.1"]
    words += [f"stages.ppo.init={finished() / 'sft'}", "stages.ppo.lr=1e-2"]
    monkeypatch.setattr(resume, "_SHARE", 0)
    whole, again = both("ppo", "ppo", words, 2, tmp_path, monkeypatch)
    assert contents(again / "ppo") == contents(whole / "ppo") and entry(again, "ppo") == entry(whole, "ppo")


def test_another_rule_is_another_result(tmp_path):
    digests = []
    for target in (3, 4, 3):
        folder = of_rules(tmp_path, f"{{rule: length, target: {target}}}", "advantage=reinforce_pp", "name=d")
        stage = read(folder / "run.json")["stages"][0]
        digests.append((stage["digest"], stage["skipped"]))
    assert digests[0][0] != digests[1][0] and not digests[1][1]
