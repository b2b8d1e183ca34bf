"""Every estimator of advantages against plain loops in float64, and its options on a run."""

from __future__ import annotations

import json
import statistics

import numpy as np
import pytest
import torch

from align.config.compose import compose
from align.rl.advantages import ESTIMATORS, estimate
from align.rl.experience import Judged, RewardRule, Rewards
from align.rl.options import Estimator, PPOOptions, refusals
from align.tracking.metrics import read_metrics
from data_prep.core.errors import UserError
from tests.align.rl.test_controls import ppo
from tests.tiny_chain import read

LENGTHS = [3, 1, 5, 2, 4, 4, 1, 6]


def drawn(seed: int = 0) -> tuple[Rewards, Judged, list[list[float]], list[list[float]]]:
    """Rewards and values of eight replies, as tensors and as lists."""
    generator = np.random.default_rng(seed)
    rewards, values = ([generator.normal(size=n).tolist() for n in LENGTHS] for _ in range(2))
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]

    def laid(rows: list[list[float]]) -> torch.Tensor:
        out = torch.zeros(mask.shape, dtype=torch.float64)
        out[mask] = torch.tensor([x for row in rows for x in row], dtype=torch.float64)
        return out

    nothing = torch.zeros_like(laid(rewards))
    judged = Judged(mask, nothing, nothing, laid(values), nothing, nothing[:, 0], mask, nothing)
    return Rewards(laid(rewards), nothing[:, 0], nothing), judged, rewards, values


def rule(estimator: Estimator, **more) -> RewardRule:
    return RewardRule(
        0.1, 0.0, 1.0, 10.0, 1.0, temperature=1.0, estimator=estimator, **{"gamma": 1.0, "lam": 0.95, **more}
    )


def white(rows: list[list[float]]) -> list[list[float]]:
    every = [x for row in rows for x in row]
    mean, spread = statistics.fmean(every), statistics.pvariance(every)
    return [[(x - mean) / (spread + 1e-8) ** 0.5 for x in row] for row in rows]


def found(estimator: Estimator, **more) -> list[list[float]]:
    rewards, judged, *_ = drawn()
    given = estimate(rewards, judged, rule(estimator, **more), lambda total: total)
    assert not given.advantages_BT[~judged.mask_BT].any()
    if not estimator.has_critic:
        assert not given.returns_BT.any()
    return [row[: LENGTHS[i]].tolist() for i, row in enumerate(given.advantages_BT)]


def same(ours: list[list[float]], theirs: list[list[float]]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, abs=1e-9)


@pytest.mark.parametrize("group", [2, 4, 8])
def test_rloo_leaves_the_reply_itself_out(group):
    whole = [sum(row) for row in drawn()[2]]
    theirs = []
    for i, n in enumerate(LENGTHS):
        others = [whole[j] for j in range(8) if j // group == i // group and j != i]
        theirs.append([whole[i] - statistics.fmean(others)] * n)
    same(found(Estimator.rloo, group_size=group), theirs)


@pytest.mark.parametrize("group", [2, 4, 8])
def test_grpo_counts_in_deviations_of_the_group(group):
    whole = [sum(row) for row in drawn()[2]]
    theirs = []
    for i, n in enumerate(LENGTHS):
        held = [whole[j] for j in range(8) if j // group == i // group]
        theirs.append([(whole[i] - statistics.fmean(held)) / (statistics.stdev(held) + 1e-4)] * n)
    same(found(Estimator.grpo, group_size=group), theirs)


def test_grpo_learns_nothing_from_replies_that_are_all_alike():
    rewards, judged, *_ = drawn()
    alike = Rewards(torch.where(judged.mask_BT, 1.0 / judged.mask_BT.sum(1, keepdim=True), 0.0), *([rewards.kl_BT] * 2))
    given = estimate(alike, judged, rule(Estimator.grpo, group_size=4), lambda total: total)
    assert float(given.advantages_BT.abs().max()) < 1e-6


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_pp_counts_what_is_still_to_come(group, gamma):
    rows = drawn()[2]
    theirs = []
    for i, row in enumerate(rows):
        held = [sum(rows[j]) for j in range(8) if j // group == i // group]
        base = statistics.fmean(held) if group > 1 else 0.0
        theirs.append([sum(gamma ** (k - t) * row[k] for k in range(t, len(row))) - base for t in range(len(row))])
    same(found(Estimator.reinforce_pp, group_size=group, gamma=gamma), white(theirs))


@pytest.mark.parametrize(("lam", "alpha"), [(0.95, 0.0), (0.5, 0.0), (0.95, 0.5), (0.95, 0.05)])
def test_gae_with_one_lambda_and_with_one_by_length(lam, alpha):
    _, _, rows, values = drawn()
    theirs = []
    for row, value in zip(rows, values, strict=True):
        n = len(row)
        own = max(0.0, 1 - 1 / (alpha * n)) if alpha else lam
        delta = [row[t] + 0.97 * (value[t + 1] if t + 1 < n else 0.0) - value[t] for t in range(n)]
        theirs.append([sum((0.97 * own) ** k * delta[t + k] for k in range(n - t)) for t in range(n)])
    same(found(Estimator.gae, gamma=0.97, lam=lam, lam_length=alpha), white(theirs))


def test_every_name_has_an_estimator():
    assert set(ESTIMATORS) == set(Estimator)


# ---------------------------------------- options
@pytest.mark.parametrize(
    ("options", "field"),
    [
        (PPOOptions(advantage=Estimator.rloo, batch_size=126), "group_size"),
        (PPOOptions(advantage=Estimator.grpo, group_size=1), "group_size"),
        (PPOOptions(group_size=3), "group_size"),
        (PPOOptions(advantage=Estimator.reinforce_pp, lam_length=0.05), "lam_length"),
    ],
)
def test_groups_that_cannot_be_are_one_line(options, field):
    (problem,) = refusals(options, "stages.ppo")
    assert problem.field == f"stages.ppo.{field}" and problem.hint and "\n" not in str(problem)


def test_a_critics_warm_up_is_no_matter_without_one():
    assert not list(refusals(PPOOptions(advantage=Estimator.rloo, updates=3), "stages.ppo"))
    assert list(refusals(PPOOptions(updates=3), "stages.ppo"))


def test_an_unknown_estimator_is_answered_with_those_there_are():
    with pytest.raises(UserError, match="rloo"):
        compose(["stages.ppo.advantage=rlo"])


# ---------------------------------------- a run
@pytest.mark.parametrize("name", ["rloo", "grpo", "reinforce_pp"])
def test_a_run_without_a_critic(name, tmp_path):
    """No value role, no warm-up, nothing saved of it, the same prompts side by side, and less memory."""
    run = ppo(tmp_path, f"advantage={name}", "group_size=4", "updates=2", "lr=1e-2", f"name={name}")
    assert not (run / "ppo" / "value").exists()
    rows = [row for row in read_metrics(run / "ppo" / "metrics.jsonl") if row["split"] == "train"]
    assert not [key for row in rows for key in row if key.startswith("value/") or key == "grad_norm_1"]
    assert rows[1]["objective/kl_k1"] != 0, "the first update has moved the policy"
    metrics = read(run / "run.json")["stages"][0]["metrics"]
    assert metrics["step0"]["grad_roles"] == ["policy"] and metrics["step0"]["ratio_dev"] <= 1e-5
    assert metrics["memory"]["ratio"] < 2
    prompts = [json.loads(line)["id"] for line in (run / "ppo" / "samples.jsonl").read_text().splitlines()]
    assert prompts == [prompts[0]] * 4 + [prompts[4]] * 4 and prompts[0] != prompts[4]
