"""Stages that options ask for: their names, what they stand on, and that they are set like any other."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.config.compose import compose, explain
from align.config.schema import RunConfig
from data_prep.core.errors import UserError


def shown(config: RunConfig) -> list[tuple[str, str, str | None, str | None]]:
    """(name, kind, init, reward) of every stage."""
    return [(each.name, each.stage.name, each.stage.init, each.stage.reward) for each in config.stages]


def refused(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        compose(list(words))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_each_round_stands_on_the_one_before() -> None:
    assert shown(compose(["stages.ppo.refresh=2"])) == [
        ("sft", "sft", None, None),
        ("reward_model", "reward_model", "sft", None),
        ("ppo", "ppo", "sft", "reward_model"),
        ("reward_model_2", "refresh", "ppo", "reward_model"),
        ("ppo_2", "ppo", "ppo", "reward_model_2"),
        ("reward_model_3", "refresh", "ppo_2", "reward_model_2"),
        ("ppo_3", "ppo", "ppo_2", "reward_model_3"),
        ("evaluate", "evaluate", None, None),
    ]


def test_a_round_repeats_what_was_set_and_can_be_set_itself() -> None:
    words = ["stages.ppo.updates=7", "stages.ppo.max_new_tokens=9", "stages.reward_model.adapter=vera"]
    own = ["stages.ppo_2.updates=3", "stages.reward_model_2.prompts=5", "stages.ppo.critic=parent"]
    specs = {spec.name: spec for spec in compose([*own, *words, "stages.ppo.refresh=1"]).stages}
    assert [specs[name].stage.updates for name in ("ppo", "ppo_2")] == [7, 3]
    assert specs["ppo_2"].stage.refresh == 0, "rounds have none of their own"
    assert specs["ppo_2"].stage.critic.name == "zero", "the critic beside its parent knows another reward model"
    assert specs["reward_model_2"].stage.prompts == 5
    assert specs["reward_model_2"].stage.max_new_tokens == specs["ppo_2"].stage.max_new_tokens == 9
    assert specs["reward_model_2"].adapter.method == "vera", "it goes on with that reward model"


def test_a_reward_model_of_another_run_is_gone_on_with() -> None:
    words = ["pipeline=ppo", "stages.ppo.init=RUN/sft", "stages.ppo.reward=RUN/reward_model", "stages.ppo.refresh=1"]
    assert shown(compose(words))[1:] == [
        ("reward_model_2", "refresh", "ppo", "RUN/reward_model"),
        ("ppo_2", "ppo", "ppo", "reward_model_2"),
    ]


def test_a_recipe_can_ask_for_rounds(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nstages:\n  ppo: {refresh: 1, updates: 8}\n  ppo_2: {updates: 9}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="ppo_2"):  # a recipe has no place in the order for it
        compose(["experiment=mine"], str(tmp_path))
    (tmp_path / "experiment" / "mine.yaml").write_text(text.replace("  ppo_2: {updates: 9}\n", ""), encoding="utf-8")
    config = compose(["experiment=mine", "stages.ppo_2.updates=9"], str(tmp_path))
    assert [spec.stage.updates for spec in config.stages if spec.stage.name == "ppo"] == [8, 9]


def test_without_rounds_nothing_is_added_and_no_name_is_known() -> None:
    assert len(compose(["stages.ppo.refresh=0"]).stages) == 4
    assert "unknown stage 'ppo_2'" in refused("stages.ppo_2.updates=3")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stages.ppo.refresh=lots"], "stages.ppo.refresh: expected a whole number"),
        (["stages.ppo.refresh=-1"], "stages.ppo.refresh: out of range"),
        (["stages.ppo.refresh=1000000"], "stages.ppo.refresh: out of range"),
        (["stages.ppo.refresh=1", "stages.ppo.reward={rule: number}"], "go on with one reward model"),
        (["stages.ppo.refresh=1", "stages.ppo.reward=[reward_model, {rule: number}]"], "go on with one reward model"),
        (["stages.ppo.refresh=1", "stages.ppo_2.updats=3"], "did you mean 'stages.ppo_2.updates'?"),
        (["stages.ppo.refresh=1", "stages.reward_model_2.judge={checkpoint: reward_model}"], "is no judge"),
    ],
)
def test_what_cannot_be_is_one_line(words: list[str], said: str) -> None:
    assert said in refused(*words)


def test_origins_of_a_round_are_its_own_or_those_of_the_stage_that_it_repeats() -> None:
    _, told = explain(["stages.ppo.refresh=1", "stages.ppo_2.updates=3", "stages.ppo.kl_coef=0.2"])
    assert told["stages.ppo_2.updates"] == told["stages.ppo_2.kl_coef"] == "command line"
    assert told["stages.ppo_2.clip"] == "default of PPO"
    assert told["stages.ppo_2.init"].endswith("of what adds ppo_2")


def test_an_ensemble_by_number_is_trained_with_other_seeds() -> None:
    config = compose(["stages.ppo.reward={ensemble: 3, by: min}", "stages.reward_model.epochs=2"])
    names = ["reward_model", "reward_model_seed1", "reward_model_seed2"]
    assert [spec.name for spec in config.stages] == ["sft", *names, "ppo", "evaluate"]
    specs = {spec.name: spec.stage for spec in config.stages}
    assert [(specs[name].reseed, specs[name].epochs, specs[name].init) for name in names] == [
        (0, 2.0, "sft"),
        (1, 2.0, "sft"),
        (2, 2.0, "sft"),
    ]
    ppo = specs["ppo"]
    assert [ppo.reward_model, *ppo.ensemble] == names


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stages.ppo.reward={ensemble: 1}"], "two or more different reward models"),
        (["stages.ppo.reward={ensemble: 3, stage: rewardmodel}"], "trains the stage 'rewardmodel'"),
        (["stages.ppo.reward={ensemble: 3, stage: sft}"], "trains the stage 'sft'"),
        (["pipeline=ppo", "stages.ppo.reward={ensemble: 3}"], "the run has no such reward model"),
        (["stages.ppo.reward={ensemble: 2}", "stages.ppo.refresh=1"], "go on with one reward model"),
        (["stages.ppo.reward={ensemble: true}"], "expected a list"),
        (["stages.ppo.reward={ensemble: 21}"], "ensemble: out of range (got 21; expected at most 20)"),
    ],
)
def test_an_ensemble_that_cannot_be_trained_is_one_line(words: list[str], said: str) -> None:
    assert said in refused(*words)
