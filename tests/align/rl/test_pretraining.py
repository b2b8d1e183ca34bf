"""The pretraining loss that may be mixed into PPO's: what is added, which rows, and where it is refused."""

from __future__ import annotations

import pytest
import torch

from align.config.compose import compose
from align.planning.preflight import source_problems
from align.rl.actor_critic import ActorCritic
from align.rl.pretraining import MixedActorCritic, MixedRow, Pretraining
from align.stages.ppo import PPO
from align.training.objectives import LanguageModeling
from data_prep.core.errors import UserError
from tests.tiny_chain import pipeline_words, rows_folder
from tests.tiny_training import (
    experience_rows,
    gradients,
    mixed_actor_critic,
    options,
    token_rows,
    updater,
)


def beside(rows: list, row: MixedRow) -> str:
    """The conversation beside a reply."""
    return next(each.id for each in rows if list(each.ids) == list(row.ids))


def test_it_adds_the_mean_over_the_conversations_supervised_tokens():
    """To the gradient too, and not as replies are weighed: there are more of their tokens."""
    objective, rows = mixed_actor_critic()
    parts = {}
    for name, one in (
        ("ppo", ActorCritic(objective.policy, objective.value, objective.loss)),
        ("language", LanguageModeling(objective.policy)),
        ("mixed", objective),
    ):
        given = rows if name != "language" else [each for row in rows for each in token_rows(20) if each.ids == row.ids]
        runner = updater(one, options(), 1, lr=0.0)
        numbers = runner.step([one.collate(given)])
        parts[name] = numbers, {key.removeprefix("role."): grad for key, grad in gradients(one).items()}
    (ppo, ppo_grad), (language, language_grad), (mixed, mixed_grad) = parts.values()
    assert mixed["policy/ptx_loss"] == pytest.approx(language["loss"], rel=1e-6)
    assert mixed["loss"] == pytest.approx(ppo["loss"] + 0.4 * language["loss"], rel=1e-6)
    assert mixed["policy/loss"] == ppo["policy/loss"]
    for name, grad in mixed_grad.items():
        more = language_grad.get(name.removeprefix("policy."), 0.0) if name.startswith("policy.") else 0.0
        assert torch.allclose(grad, ppo_grad[name] + 0.4 * more, atol=1e-6, rtol=0), name
    assert any(grad.abs().max() > 1e-4 for grad in language_grad.values())


def test_rows_are_drawn_by_seed_and_update_and_none_comes_twice_where_there_are_enough():
    rows, replies = token_rows(20), experience_rows(16)
    every = [[beside(rows, row) for row in Pretraining(rows, seed=3).beside(replies, update)] for update in (0, 0, 1)]
    assert every[0] == every[1] != every[2] and all(len(set(one)) == 16 for one in every)
    assert every[0] != [beside(rows, row) for row in Pretraining(rows, seed=4).beside(replies, 0)]
    few = Pretraining(rows[:3], seed=3).beside(replies, 0)
    assert len(few) == 16 and {beside(rows, row) for row in few} <= {each.id for each in rows[:3]}
    assert all(
        (row.prompt, row.reply, row.returns) == (one.prompt, one.reply, one.returns)
        for row, one in zip(few, replies, strict=True)
    )


@pytest.mark.parametrize("rests", ["warming", "evaluation"])
def test_it_is_added_only_where_the_policy_is_trained(rests):
    objective, rows = mixed_actor_critic()
    objective.warming = rests == "warming"
    objective.train(rests == "warming")
    _, numbers = objective(objective.collate(rows))
    assert "policy/ptx_loss" not in numbers


def test_conversations_are_read_only_where_they_are_mixed_in():
    assert PPO().reads == ("prompts",) and PPO(ptx_coef=0.1).reads == ("prompts", "conversations")
    assert {"ptx_coef", "ema_decay"} <= PPO().idle and not {"ptx_coef", "ema_decay"} & PPO(
        ptx_coef=0.1, ema_decay=0.9
    ).idle
    with pytest.raises(UserError, match="fewer than one batch"):
        PPO(ptx_coef=0.1, batch_size=8).check_rows("stages.ppo", "prompts", 1)
    PPO(ptx_coef=0.1, batch_size=8).check_rows("stages.ppo", "conversations", 1)
    assert isinstance(PPO(ptx_coef=0.1)._objective(type("R", (), {"policy": None, "value": None})), MixedActorCritic)


def test_without_conversations_it_is_refused_in_a_line():
    prompts = f"data.prompts.path={rows_folder() / 'conversations.jsonl'}"
    words = pipeline_words("ppo", "data.conversations.path=null", prompts, "stages.ppo.ptx_coef=0.1")
    (problem,) = [problem for _, problem in source_problems(compose(words))]
    assert problem.message == "data 'files' has no conversations"
    assert f"data.conversations.path={rows_folder() / 'preferences.jsonl'} reads its rows as such" in problem.hint
    assert not list(source_problems(compose(words[:-1])))
