"""A critic that is to be taken over from the parent: known to be there, or not, before anything is trained."""

from __future__ import annotations

import pytest

from align.config.compose import compose
from align.planning.preflight import plan_stages
from tests.tiny_chain import base, finished, pipeline_words


def problems(*words: str) -> list[str]:
    return [problem.code for plan in plan_stages(compose(list(words)), base()) for problem in plan.problems]


def test_a_chain_whose_parent_has_no_critic_is_refused_before_it_begins() -> None:
    assert problems(*pipeline_words("rlhf")) == []
    assert problems(*pipeline_words("rlhf"), "stages.ppo.critic=parent") == ["no_critic"]


@pytest.mark.parametrize(("stage", "expected"), [("sft", ["no_critic"]), ("ppo", [])])
def test_a_finished_parent_is_looked_at(stage: str, expected: list[str]) -> None:
    run = finished()
    words = [f"stages.ppo.init={run / stage}", f"stages.ppo.reward={run / 'reward_model'}", "stages.ppo.critic=parent"]
    assert problems(*pipeline_words("ppo"), *words) == expected


def test_without_a_critic_there_is_none_to_take() -> None:
    assert problems(*pipeline_words("rlhf"), "stages.ppo.critic=parent", "stages.ppo.advantage=rloo") == ["no_effect"]
