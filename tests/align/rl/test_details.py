"""Details of docs/ppo.md that no other test holds by itself; `tests/rl_details.py` has a wrong line for each."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align.config.schema import Load
from align.rl import ppo
from align.rl.actor_critic import ActorCritic, PPOLoss
from align.rl.options import PPOOptions
from align.rl.ppo import adapted_kl_coef
from align.rl.watch import Watch
from align.stages.ppo import PPO
from align.stages.reward_model import measure
from align.training.optimizer import Updater
from data_prep.core.errors import TrainingStopped
from reward.head import ScalarHead
from tests.align.rl.test_ppo import troupe
from tests.tiny_chain import bases, fresh
from tests.tiny_training import actor_critic, experience_rows, pairwise, process, weights

SET = PPO(updates=4, batch_size=8, minibatches=2, ppo_epochs=3, lr=1e-3, critic_warmup=1, max_approx_kl=1e9)
CHECKED = {"ratio_dev": 0.0}
"""What step 0 has found in a run whose first minibatch has been checked."""


def context(**more: Any) -> Any:
    """What an updater and the passes ask of a stage's context."""
    model, spec = SimpleNamespace(lr_scale=1.0), SimpleNamespace(name="ppo_2")
    known = {"spec": spec, "config": SimpleNamespace(model=model), **more}
    return SimpleNamespace(accelerator=process(), seed=3, lr=1e-3, **known)


def updater(options: PPO) -> Updater:
    return options._updater(context(), troupe())


def rows_of(runner: Updater, count: int = 8) -> list[Any]:
    """Replies whose old log-probabilities are those of the policy, so that no ratio is far from 1."""
    objective, rows = runner.objective, experience_rows(count)
    batch = objective.collate(rows)
    role, made, start = objective.policy, [], 0
    with torch.no_grad():
        hidden = role.hidden(batch.packed)[batch.source_M]
        logprobs = torch.log_softmax(role.logits(hidden) / objective.loss.temperature, -1)
    chosen = logprobs.gather(1, batch.targets_M[:, None])[:, 0].tolist()
    for row in rows:
        made.append(replace(row, logprobs=chosen[start : start + len(row.reply)]))
        start += len(row.reply)
    return made


# ---------------------------------------- scores
def test_a_reward_model_is_measured_over_both_sides():
    """Mean and deviation are those of chosen and rejected replies together, in float64."""
    objective, rows = pairwise()
    found = measure(process(), objective, rows, [[0, 1, 2], list(range(3, len(rows)))])
    scores = torch.tensor(found["scores"] + found["rejected"], dtype=torch.float64)
    assert len(scores) == 2 * len(rows)
    assert found["norm"] == {"mean": pytest.approx(float(scores.mean())), "std": pytest.approx(float(scores.std()))}
    assert found["norm"]["mean"] != pytest.approx(float(scores[: len(rows)].mean()), rel=1e-3)


def test_what_is_set_of_the_reward_reaches_it():
    given = {"kl_coef": 0.3, "missing_eos_penalty": 0.7, "gamma": 0.9, "lam": 0.8, "temperature": 0.6}
    norm = {"mean": 0.4, "std": 2.0}
    judge = SimpleNamespace(load=Load.fp32.value, record={"reward_norm": norm})
    stage = context(judges=[judge], parent_mode=SimpleNamespace(load=Load.fp32))
    rule = PPO(reward_clip=3.0, lam_length=0.2, **given)._rule(stage, SimpleNamespace(train=[]), troupe())
    assert {name: getattr(rule, name) for name in given} == given
    assert (rule.clip, rule.lam_length, rule.signals) == (3.0, 0.2, None)
    assert {"mean": rule.mean, "std": rule.std} == norm


# ---------------------------------------- the KL coefficient
@pytest.mark.parametrize(
    ("kl", "factor"),
    [(2.0, 1.0), (3.0, math.exp(0.05)), (1.0, math.exp(-0.05)), (400.0, math.exp(0.1)), (-50.0, math.exp(-0.1))],
)
def test_the_coefficient_moves_by_at_most_e_in_a_horizon(kl, factor):
    options = PPOOptions(kl_coef=0.1, kl_target=2.0, kl_horizon=10)
    assert adapted_kl_coef(0.1, kl, options) == pytest.approx(0.1 * factor)


@pytest.mark.parametrize("horizon", [1, 10, 10000])
@pytest.mark.parametrize("kl", [-1e9, 0.0, 1e9])
def test_no_horizon_and_no_kl_makes_the_coefficient_explode_or_negative(horizon, kl):
    options, coefficient = PPOOptions(kl_coef=0.05, kl_target=1.0, kl_horizon=horizon), 0.05
    for _ in range(200):
        coefficient = adapted_kl_coef(coefficient, kl, options)
        assert 0.0005 <= coefficient <= 5.0


# ---------------------------------------- steps
def test_the_value_loss_has_its_weight():
    objective, rows = actor_critic()
    losses = []
    for weight in (0.0, 0.7):
        objective.loss = PPOLoss(value_coef=weight)
        loss, numbers = objective(objective.collate(rows))
        losses.append(float(loss.detach()))
    assert losses[1] - losses[0] == pytest.approx(0.7 * float(numbers["value/loss"]), rel=1e-5)


def test_the_optimiser_is_the_one_that_was_set():
    runner = updater(replace(SET, value_lr_ratio=3.0, eps=1e-4, beta2=0.9))
    rates = {group["role"]: group["lr"] for group in runner.optimizer.param_groups}
    assert rates == {"policy": pytest.approx(1e-3), "value": pytest.approx(3e-3)}
    assert {group["wait"] for group in runner.optimizer.param_groups if group["role"] == "policy"} == {6}
    assert all((group["eps"], group["betas"]) == (1e-4, (0.9, 0.9)) for group in runner.optimizer.param_groups)


def test_every_pass_takes_every_reply_once(monkeypatch):
    """Three passes of two minibatches, each pass cut otherwise."""
    runner = updater(SET)
    rows, taken = rows_of(runner), []
    collate = ActorCritic.collate
    monkeypatch.setattr(
        ActorCritic, "collate", lambda self, own: taken.append([row.id for row in own]) or collate(self, own)
    )
    ppo.passes(context(), runner, rows, 1, CHECKED)
    assert len(taken) == 6
    for one in range(0, 6, 2):
        assert sorted(taken[one] + taken[one + 1]) == sorted(row.id for row in rows)
    assert len({tuple(sorted(taken[one])) for one in range(0, 6, 2)}) == 3


def test_passes_end_once_the_policy_has_moved_far_enough():
    """The steps that are left out count in the schedule: the next update begins where it would have."""
    runner = updater(replace(SET, max_approx_kl=1e-12, lr=1e-2))
    rows = rows_of(runner)
    ppo.passes(context(), runner, rows, 1, CHECKED)
    assert runner.step_number == 6 + 2, "one pass of three"
    numbers = ppo.passes(context(), runner, rows, 2, CHECKED)
    assert numbers["lr"] == pytest.approx(1e-3 * (1 - (12 + 1) / 24))


def test_the_policy_rests_while_the_critic_warms_up():
    runner = updater(SET)
    objective, before = runner.objective, weights(runner.objective)
    ppo.passes(context(), runner, rows_of(runner), 0, CHECKED)
    moved = {name.partition(".")[0] for name, p in weights(objective).items() if not torch.equal(p, before[name])}
    assert moved == {"value"}
    steps = {
        runner.optimizer.state.get(p, {}).get("step") for n, p in objective.named_parameters() if n[:6] == "policy"
    }
    assert steps == {None}, "its moments and its weight decay begin after the warm-up"
    runner.go_to(6)
    ppo.passes(context(), runner, rows_of(runner), 1, CHECKED)
    moved = {name.partition(".")[0] for name, p in weights(objective).items() if not torch.equal(p, before[name])}
    assert moved == {"policy", "value"}


def test_the_value_is_not_clipped_while_it_warms_up():
    found = bases()
    value = fresh("lora", Load.fp32, found, seed=2)
    value.head = ScalarHead(32)
    objective = ActorCritic(fresh("lora", Load.fp32, found), value, PPOLoss(value_clip=1e-3))
    batch = objective.collate(experience_rows(4))
    clipped = objective(batch)[1]["value/clipfrac"]
    objective.warming = True
    loss, numbers = objective(batch)
    assert clipped > 0 and numbers["value/clipfrac"] == 0
    error = value.scores(batch.packed, batch.source_M) - batch.numbers["returns"]
    assert float(loss) == pytest.approx(float(0.5 * error.square().sum()), rel=1e-5)
    loss.backward()
    grads = [p.grad for p in objective.clip_groups()[0]]
    assert all(grad is not None and not grad.any() for grad in grads), "every process adds the same gradients"


# ---------------------------------------- stops
def test_a_mean_ratio_past_its_bound_stops():
    runner = updater(SET)
    rows = [replace(row, logprobs=[x - 5 for x in row.logprobs]) for row in rows_of(runner)]
    with pytest.raises(TrainingStopped, match="passes max_ratio") as caught:
        ppo.passes(context(), runner, rows, 1, CHECKED)
    assert caught.value.code == "ratio" and "stages.ppo_2.ppo_epochs" in caught.value.hint


@pytest.mark.parametrize(("kl", "ends"), [(15.1, True), (14.9, False)])
def test_a_kl_past_its_limit_ends_the_stage(kl, ends):
    runner = updater(SET)
    watch = Watch(SimpleNamespace(spec=SimpleNamespace(name="ppo")), runner, None)
    numbers = {"objective/kl_k1": kl, "objective/entropy": 1.0, "objective/score_spread": 1.0}
    numbers |= {"objective/score_shaped": 0.0, "response/len_mean": 5.0, "response/repeat_rate": 0.0}
    assert watch.ends(2, {**numbers, "response/eos_rate": 1.0}, SimpleNamespace(signals=None)) is ends
    assert watch.finish() == ({"stopped_on_kl": 1.0} if ends else {})
