"""What steers PPO beside its loss: the critic's start and warm-up, the KL coefficient, the schedule, one precision."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from align.adapters.layers.adalora import Allocation
from align.rl import experience, invariants
from align.rl.actor_critic import ActorCritic
from align.tracking.metrics import read_metrics
from align.training.optimizer import Updater
from data_prep.core.errors import UserError
from tests.tiny_chain import finished, made, read


@pytest.fixture(autouse=True)
def chain() -> None:
    """The chain that the runs stand on is made before anything is watched."""
    finished()


def ppo(out: Path, *words: str) -> Path:
    """A short PPO run on the finished chain."""
    chain = finished()
    own = [f"stages.ppo.{word}" if not word.startswith(("adapter", "name")) else word for word in words]
    return made("ppo", f"stages.ppo.init={chain / 'sft'}", f"stages.ppo.reward={chain / 'reward_model'}", *own, out=out)


def train_rows(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run / "ppo" / "metrics.jsonl") if row["split"] == "train"]


# ---------------------------------------- the KL coefficient
def test_the_coefficient_rests_while_the_critic_warms_up(tmp_path):
    """Also the schedule: passes that end early leave out their steps, and the rate falls as updates pass."""
    words = ["updates=4", "critic_warmup=2", "kl_coef=0.05", "kl_target=0.5", "kl_horizon=1", "lr=1e-3", "ppo_epochs=3"]
    rows = train_rows(ppo(tmp_path, *words, "max_approx_kl=1e-12", "name=k"))
    coefficients = [row["objective/kl_coef"] for row in rows]
    assert coefficients[:3] == [0.05] * 3 and coefficients[3] < 0.05
    steps, each = 4 * 3 * 2, 3 * 2  # updates x passes x minibatches
    last = [1 * each + each - 1, 2 * each + 1, 3 * each + 1]  # the warm-up's passes do not end early
    assert [row["lr"] for row in rows[1:]] == pytest.approx([1e-3 * (1 - step / steps) for step in last])


# ---------------------------------------- the critic
def test_the_critic_starts_from_nothing_and_the_policy_is_not_computed_meanwhile(tmp_path, monkeypatch):
    """Its first values are 0; two of three updates are its own, in which the policy's optimiser state stays empty."""
    computed, states = [], []
    policy, step = ActorCritic._policy, Updater.step
    monkeypatch.setattr(ActorCritic, "_policy", lambda self, *given: computed.append(1) or policy(self, *given))

    def watch(self, window, **how):
        numbers = step(self, window, **how)
        states.append([bool(self.optimizer.state.get(p)) for p in self.objective.clip_groups()[0]])
        return numbers

    monkeypatch.setattr(Updater, "step", watch)
    rows = train_rows(ppo(tmp_path, "updates=3", "critic_warmup=2", "ppo_epochs=1", "name=c"))
    assert rows[0]["value/mean"] == 0 and rows[1]["value/mean"] != 0
    assert rows[0]["value/explained_var"] == pytest.approx(0, abs=1e-6)
    assert len(computed) == 1 + 2, "once to be checked, and in the last update"
    assert [any(state) for state in states] == [False] * 4 + [True] * 2
    assert "policy/loss" not in rows[1] and "policy/loss" in rows[2]
    record = read(tmp_path / "c" / "run.json")["stages"][0]["metrics"]
    assert record["step0"]["grad_roles"] == ["policy", "value"] and record["step0"]["ratio_dev"] <= 1e-5


def test_adalora_ranks_by_the_policys_own_steps(tmp_path, monkeypatch):
    """Not before there is a gradient, and to the end of its course though passes end early."""
    seen = []
    original = Allocation.after_step

    def watch(self, carrier, step):
        seen.append((step, self.final))
        original(self, carrier, step)

    monkeypatch.setattr(Allocation, "after_step", watch)
    words = ["updates=4", "critic_warmup=2", "ppo_epochs=2", "max_approx_kl=1e-12", "on_parent=merge"]
    ppo(tmp_path, *words, "adapter=adalora", "name=a")
    policy = [step for step, final in seen if final == 8 - round(0.3 * 8)]
    assert policy == list(range(1, 9)), "of 16 steps the first 8 are the critic's; the second passes are left out"


def test_a_saved_critic_starts_the_next_stage(tmp_path, monkeypatch):
    """Bit by bit, from its first value on; one of another reward model, or none, is a line that says what to do."""
    from safetensors.torch import load_file

    from align.stages.ppo import PPO

    first = ppo(tmp_path, "updates=2", "critic_warmup=1", "lr=1e-2", "name=first")
    held = load_file(first / "ppo" / "value" / "head.safetensors")
    seen = []
    original = PPO._updater

    def watch(self, context, roles):
        seen.append({name: p.clone() for name, p in roles.value.head.state_dict().items()})
        return original(self, context, roles)

    monkeypatch.setattr(PPO, "_updater", watch)
    words = ["updates=2", "critic_warmup=0", "critic=parent"]
    second = ppo(tmp_path, *words, f"init={first / 'ppo'}", "name=second")
    assert held.keys() == seen[0].keys() and all(torch.equal(held[name], seen[0][name]) for name in held)
    assert any(value.any() for value in held.values()) and train_rows(second)[0]["value/mean"] != 0
    assert (second / "ppo" / "value" / "checkpoint.json").is_file()
    with pytest.raises(UserError, match="no critic beside it") as caught:
        ppo(tmp_path, *words, "name=none")
    assert caught.value.field == "stages.ppo.critic" and caught.value.hint
    other = made("reward_model", "seed=7", "name=other", out=tmp_path) / "reward_model"
    with pytest.raises(UserError, match="another reward model"):
        ppo(tmp_path, *words, f"init={first / 'ppo'}", f"reward={other}", "name=judged")


# ---------------------------------------- precision
def test_every_forward_is_at_the_stages_precision(tmp_path, monkeypatch):
    """Judged and trained at one precision, ratios are 1; judged in float32 they are not, and the run is stopped."""
    from data_prep.core.errors import TrainingStopped

    monkeypatch.setattr(invariants, "COARSE", 5e-5)  # the tiny model's numbers are small
    words = ["updates=1", "critic_warmup=0", "autocast=bf16", "batch_size=32"]
    run = ppo(tmp_path, *words, "name=p")
    step0 = read(run / "run.json")["stages"][0]["metrics"]["step0"]
    assert step0["ratio_dev_mean"] <= 5e-5
    monkeypatch.setattr(experience, "autocast", lambda *_: contextlib.nullcontext())
    with pytest.raises(TrainingStopped, match="away from 1"):
        ppo(tmp_path, *words, "name=q")


def test_the_references_entropy_is_not_computed(monkeypatch):
    from tests.align.rl.test_ppo import RULE, gather, sampled, troupe

    seen = []
    original = experience.chosen_statistics

    def watch(role, *given):
        seen.append(role.name)
        return original(role, *given)

    monkeypatch.setattr(experience, "chosen_statistics", watch)
    roles = troupe()
    prompts, replies = sampled(roles.policy)
    gather(roles, prompts, replies, RULE)
    assert set(seen) == {"policy"}


# ---------------------------------------- gold
@pytest.mark.parametrize("scores", [[0.0, 1.0, 1.0, 0.0, 1.0], [-3.0, 250.0, 17.5], [2.0, 2.0]])
def test_a_gold_rule_of_any_scale_has_an_error(scores):
    from align.stages.evaluate import Answers, _summary

    found = _summary(
        Answers(["x"] * len(scores), [True] * len(scores), None, None, [{"score": s} for s in scores], None)
    )
    mean = sum(scores) / len(scores)
    assert found["gold"]["score"] == pytest.approx(mean)
    wanted = (torch.tensor(scores).double().var(unbiased=False) / len(scores)).sqrt()
    assert found["gold"]["se"] == pytest.approx(float(wanted))
    if set(scores) == {0.0, 1.0}:
        assert found["gold"]["se"] == pytest.approx((mean * (1 - mean) / len(scores)) ** 0.5)
