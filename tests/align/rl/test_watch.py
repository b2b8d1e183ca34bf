"""Held-out looks and alarms: the best weights are kept, a fooled reward ends the stage, and faults have names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from align.config.compose import compose
from align.rl import alarms, held_out
from align.rl.alarms import Alarm, Alarms
from align.rl.held_out import Course, HeldOut, Look, fell, is_due
from align.rl.options import Estimator, PPOOptions
from align.tracking.metrics import read_metrics
from align.training.optimizer import Updater
from data_prep.core.errors import UserError
from tests.align.rl.test_controls import ppo, train_rows
from tests.tiny_chain import pipeline_words, read

WARM = {"critic_warmup": 0}


class Weights:
    """Stands for an updater whose weights are a number."""

    def __init__(self) -> None:
        self.now = torch.zeros(1)

    def held(self) -> dict[str, torch.Tensor]:
        return {"w": self.now}

    def put_back(self, state: dict[str, torch.Tensor]) -> None:
        self.now = state["w"].clone()


def look(measure: float, reward: float, spread: float = 0.0) -> Look:
    return Look({"objective/score_shaped": reward, "response/distinct": 1.0}, [measure - spread, measure + spread])


def warned_in(run: Path) -> list[dict[str, Any]]:
    """What a run's PPO stage has warned of."""
    return [json.loads(line) for line in (run / "ppo" / "warnings.jsonl").read_text(encoding="utf-8").splitlines()]


# ---------------------------------------- looks
def test_the_best_weights_come_back_and_a_fooled_reward_ends_it():
    course, weights = Course(patience=2), Weights()
    measures, rewards = [0.2, 0.6, 0.5, 0.4, 0.3], [0.0, 1.0, 0.9, 1.5, 2.0]
    ended = []
    for update, (measure, reward) in enumerate(zip(measures, rewards, strict=True), 1):
        weights.now = torch.tensor([float(update)])
        ended.append(course.take(look(measure, reward), update, weights))
        assert course.fooled == [0, 0, 0, 1, 2][update - 1], "at update 3 the reward had fallen as well"
        again = Course(patience=2)
        again.restore(course.state())
        assert again.state() == course.state()
    assert ended == [False, False, False, False, True]
    assert course.finish(weights)["best_update"] == 2 and weights.now.tolist() == [2.0]


def test_a_part_of_the_measure_that_is_given_up_is_counted():
    """Less than three quarters of what it was, look after look; the whole, and what there never was, are no parts."""
    course = Course(patience=0)
    tenths = [(8, 1, 10), (7, 5, 10), (5, 5, 10), (5, 6, 10), (7, 6, 0), (5, 6, 0)]
    rows = [{"gold/topic": t / 10, "gold/persona": p / 10, "gold/score": s / 10} for t, p, s in tenths]
    looks = [Look({"objective/score_shaped": 0.0, "response/distinct": 1.0, **row}, [0.5, 0.5]) for row in rows]
    course.begun = looks[0]
    seen = []
    for update, found in enumerate(looks[1:], 1):
        course.take(found, update, Weights())
        seen.append(course.given_up["gold/topic"])
        again = Course(patience=0)
        again.restore(course.state())
        assert again.state() == course.state()
    assert seen == [0, 1, 2, 0, 1] and list(course.given_up) == ["gold/topic"]


def test_noise_is_no_fall():
    assert not fell(Look({}, [0.0, 1.0, 0.0, 1.0]), Look({}, [1.0, 0.0, 1.0, 0.2]))
    assert fell(Look({}, [0.0, 0.9, 0.1, 0.5]), Look({}, [0.4, 1.3, 0.6, 0.9]))


@pytest.mark.parametrize(
    ("options", "due"),
    [
        (PPOOptions(updates=30, critic_warmup=5), [7, 10, 13, 16, 19, 22, 25, 28, 29]),
        (PPOOptions(updates=4, critic_warmup=1), [1, 2, 3]),
        (PPOOptions(updates=10, critic_warmup=0, eval_every=4), [3, 7, 9]),
        (PPOOptions(updates=6, advantage=Estimator.rloo, eval_every=2), [1, 3, 5]),
    ],
)
def test_looks_are_at_even_distances_once_the_policy_moves_and_at_the_end(options, due):
    assert [update for update in range(options.updates) if is_due(update, options)] == due


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run that is looked at after each of its updates, by reward."""
    return ppo(tmp_path_factory.mktemp("w"), "updates=4", "lr=1e-2", "max_approx_kl=9", "name=w")


def test_a_run_publishes_the_weights_of_its_best_look(plain, tmp_path, monkeypatch):
    """Scripted measures: best after update 2, then only the reward rises; the run ends after update 4 of 6."""
    script = iter([look(0.1, 0.0), look(0.3, 0.5), look(0.6, 1.0), look(0.5, 2.0), look(0.4, 3.0)])
    held: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(HeldOut, "look", lambda *_: next(script))
    original = held_out.Course.take

    def watch(self, found, update, updater):
        held.append(updater.weights())
        return original(self, found, update, updater)

    monkeypatch.setattr(held_out.Course, "take", watch)
    seen = []
    put_back = Updater.put_back
    monkeypatch.setattr(Updater, "put_back", lambda self, state: seen.append(state) or put_back(self, state))
    words = ["updates=6", "critic_warmup=0", "patience=2", "eval_every=1", "lr=1e-2", "max_approx_kl=9", "name=b"]
    run = ppo(tmp_path, *words)
    metrics = read(run / "run.json")["stages"][0]["metrics"]
    assert metrics["best_update"] == 2 and metrics["stopped_on_monitor"] == 1
    assert metrics["held_out"] == {"objective/score_shaped": 1.0, "response/distinct": 1.0, "measure": 0.6}
    (state,) = seen
    assert all(torch.equal(state[name], held[1][name]) for name in state)
    assert any(not torch.equal(state[name], held[3][name]) for name in state)
    (warned,) = [row for row in warned_in(run) if row["code"] == "reward_hacked"]
    assert "update 2 is kept" in warned["message"] and "kl_coef" in warned["hint"]


def test_looks_are_logged_drawn_and_disturb_nothing(plain, tmp_path):
    rows = [row for row in read_metrics(plain / "ppo" / "metrics.jsonl") if row["split"] == "eval"]
    assert [row["step"] for row in rows] == [0, 2, 3, 4]
    assert abs(rows[0]["objective/kl_k1"]) < 1e-6 < abs(rows[-1]["objective/kl_k1"])
    metrics = read(plain / "run.json")["stages"][0]["metrics"]
    best = next(row for row in rows if row["step"] == metrics["best_update"])
    assert metrics["held_out"].items() >= {k: v for k, v in best.items() if "/" in k}.items()
    wanted = max(row["objective/reward"] for row in rows[1:])
    assert metrics["held_out"]["measure"] == pytest.approx(wanted, rel=1e-5)
    assert "over the distance from the parent" in (plain / "report.html").read_text(encoding="utf-8")
    unseen = ppo(tmp_path, "updates=4", "lr=1e-2", "max_approx_kl=9", "monitor=off", "name=o")
    assert train_rows(unseen) == train_rows(plain)
    assert "best_update" not in read(unseen / "run.json")["stages"][0]["metrics"]


def test_gold_is_asked_for_only_where_there_is_a_rule():
    from align.planning.check import check

    found = check(compose([*pipeline_words("rlhf"), "stages.ppo.monitor=gold"])).as_dict()
    assert [problem["field"] for problem in found["problems"] if problem["code"] == "no_gold"] == ["stages.ppo.monitor"]


# ---------------------------------------- alarms
HEALTHY = {
    "objective/kl_k1": 4.0,
    "objective/entropy": 1.5,
    "objective/score_shaped": 0.3,
    "objective/score_spread": 0.9,
    "response/len_mean": 12.0,
    "response/repeat_rate": 0.02,
    "response/eos_rate": 0.97,
    "value/explained_var": 0.3,
    "policy/clipfrac": 0.05,
}
PLANTED = {
    "kl_runaway": [{"objective/kl_k1": x} for x in (8.0, 9.0, 11.0)],
    "entropy_collapse": [{"objective/entropy": 0.02}] * 3,
    "length_drift": [{"response/len_mean": 31.0}] * 3,
    "repetition": [{"response/repeat_rate": 0.4}] * 3,
    "missing_ends": [{"response/eos_rate": 0.3}] * 3,
    "critic": [{"value/explained_var": -0.9}] * 3,
    "constant_reward": [{"objective/score_spread": 1e-4}] * 3,
    "frozen_policy": [{"objective/kl_k1": 0.0}] * 4,
    "large_steps": [{"policy/clipfrac": 0.7}] * 3,
}


def raised(rows: list[dict[str, float]], **options) -> list[str]:
    stage = Alarms(PPOOptions(**{**WARM, **options}), "stages.ppo")
    return [alarm.code for row in rows for alarm in stage.take({**HEALTHY, **row})]


@pytest.mark.parametrize("code", PLANTED)
def test_a_planted_fault_is_named_once(code):
    rows = [{}, *PLANTED[code], *PLANTED[code]]
    assert raised(rows) == [code]
    assert raised([{}, *PLANTED[code][:2], {}, *PLANTED[code][:2], {}]) == [], "it must last"


def test_short_replies_and_a_reward_of_another_scale_are_named():
    assert raised([{}, *[{"response/len_mean": 3.0}] * 3]) == ["length_drift"]
    assert raised([{"objective/score_spread": 40.0}]) == ["reward_scale"]
    assert raised([{"objective/score_shaped": -9.0}]) == ["reward_scale"]
    assert raised([{"objective/score_spread": 0.03}]) == ["reward_scale"]
    signals = Alarms(PPOOptions(**WARM), "stages.ppo", own_scale=True)
    assert signals.take({**HEALTHY, "objective/score_spread": 0.03}) == [], "a rule may seldom be satisfied"
    (alarm,) = signals.take({**HEALTHY, "objective/score_spread": 0.03, "objective/kl_k1": 9.5})
    assert alarm.code == "large_steps" and "5.5 nats" in alarm.message
    assert raised([{"response/eos_rate": 0.0}] * 3) == ["missing_ends"]


def test_a_healthy_run_raises_none():
    rising = [{"objective/kl_k1": 0.1 * i, "objective/entropy": 1.5 - 0.04 * i} for i in range(30)]
    assert raised(rising) == []
    assert raised([{"value/explained_var": -3.0, "objective/kl_k1": 0.0}] * 4, critic_warmup=5) == [], "it is warming"


def test_every_alarm_has_a_remedy_in_a_line():
    for code, planted in PLANTED.items():
        stage = Alarms(PPOOptions(**WARM), "stages.mine")
        found = [alarm for row in [{}, *planted] for alarm in stage.take({**HEALTHY, **row})]
        assert found[0].code == code and found[0].hint and "\n" not in found[0].message + found[0].hint
        assert not found[0].message.endswith(".")


def test_an_alarm_warns_or_stops(tmp_path, monkeypatch):
    def planted(history, moving, stage):
        if len(history) == 2:
            yield Alarm("planted", "something is wrong", "mend it")

    monkeypatch.setattr(alarms, "CHECKS", (planted,))
    run = ppo(tmp_path, "updates=3", "on_alarm=stop", "eval_every=9", "name=s")
    record = read(run / "run.json")
    assert record["stages"][0]["metrics"]["stopped_on_alarm"] == 1 and len(train_rows(run)) == 2
    (warned,) = [row for row in warned_in(run) if row["code"] == "planted"]
    assert warned["message"] == "at update 2, something is wrong" and warned["hint"] == "mend it"


def test_an_alarm_of_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="warn"):
        compose(["stages.ppo.on_alarm=shout"])
