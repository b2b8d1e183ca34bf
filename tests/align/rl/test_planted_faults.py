"""Faults planted in tiny PPO stages, each named by an alarm with its cause, and a healthy one that names none.

Every stage here is the whole loop (`tests/align/rl/tiny_loop.py`) on a policy that has learned to answer; what a fault
does to a reward model is planted in `tests/align/stages/test_planted_judges.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from align.rl.gold import Gold
from align.roles import Role
from align.training.optimizer import Updater
from tests.align.rl.tiny_loop import Went, talker, went

WORD, OTHER = 20, 23


def has_word(ids: list[int], ended: bool) -> float:
    return float(WORD in ids)


def loves_words(ids: list[int], ended: bool) -> float:
    return float(ids.count(OTHER))


def loves_none(ids: list[int], ended: bool) -> float:
    return -loves_words(ids, ended)


def dead(role: Role) -> None:
    """Both factors of every LoRA layer are 0, so that neither has a gradient."""
    with torch.no_grad():
        for name, parameter in role.named_parameters():
            if "lora_" in name:
                parameter.zero_()


def named(found: Went, code: str, cause: str, remedy: str) -> None:
    """The fault is warned of, and the line says why and what to do."""
    assert code in found.warned, found.warned
    message, hint = found.warned[code]
    assert cause in message and remedy in hint and "\n" not in message + hint


def test_a_healthy_stage_names_nothing(tmp_path: Path) -> None:
    found = went(tmp_path, has_word, updates=10, missing_eos_penalty=1.0, kl_coef=0.05, gold=by(has_word))
    rewards = [numbers["objective/score"] for _, split, numbers in found.logged if split == "train"]
    assert found.warned == {} and not [key for key in found.result if key.startswith("stopped")]
    assert rewards[-1] > rewards[0] + 0.2, "it has learned"


def by(score: Any) -> Gold:
    """A second measure: what a function says of the replies."""
    return lambda prompts, texts, replies: [{"score": score(reply.ids, reply.finished)} for reply in replies]


FAULTS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "labels that are swapped throughout": (
        {"score": loves_words, "gold": by(loves_none), "updates": 10, "lr": 4e-3, "eval_every": 1},
        "reward_hacked",
        "the reward rises and replies get worse",
        "train the reward model on what it is fooled by",
    ),
    "a reward that loves length": (
        {"score": lambda ids, _: len(ids) / 4, "updates": 12, "lr": 4e-3, "max_new_tokens": 16},
        "length_drift",
        "the reward model may love length",
        "pairs of all lengths",
    ),
    "a reward that loves a word": (
        {"score": loves_words, "updates": 10, "lr": 4e-3},
        "repetition",
        "the reward model pays for it",
        "add repeated replies to the rejected ones",
    ),
    "the same reward for everything": (
        {"score": lambda *_: 1.0, "updates": 3},
        "constant_reward",
        "it teaches nothing",
        "look at the replies",
    ),
    "ends that were never learned": (
        {"score": has_word, "updates": 3, "base": False},
        "missing_ends",
        "hardly any reply ends within 8 tokens",
        "see that the rows of sft end in the end token",
    ),
    "ends that are unlearned": (
        {"score": lambda ids, _: len(set(ids)) / 2, "updates": 8, "lr": 4e-3},
        "missing_ends",
        "replies stop ending",
        "missing_eos_penalty",
    ),
    "a policy that no gradient reaches": (
        {"score": has_word, "updates": 4, "method": "lora", "spoiled": dead},
        "frozen_policy",
        "the policy does not move",
        "raise stages.ppo.lr",
    ),
    "a learning rate that is far too large": (
        {"score": has_word, "updates": 3, "lr": 0.3},
        "large_steps",
        "steps are too large to be trusted",
        "lower stages.ppo.lr",
    ),
    "a learning rate that is too large": (
        {"score": has_word, "updates": 3, "lr": 3e-2, "ppo_epochs": 4, "max_approx_kl": 1e9},
        "large_steps",
        "nats of KL per reply",
        "lower stages.ppo.lr",
    ),
    "a deviation that is too small": (
        {"score": lambda ids, _: float(len(ids)), "updates": 1, "norm": (4.0, 0.01)},
        "reward_scale",
        "their normalisation does not fit these replies",
        "normalise=start",
    ),
    "a mean that is far off": (
        {"score": lambda ids, _: float(len(ids)), "updates": 1, "norm": (100.0, 1.0)},
        "reward_scale",
        "their normalisation does not fit these replies",
        "normalise=start",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(fault: str, tmp_path: Path) -> None:
    given, code, cause, remedy = FAULTS[fault]
    given = {**given, **({"base": talker(ends=False)} if given.get("base") is False else {})}
    named(went(tmp_path, given.pop("score"), **given), code, cause, remedy)


# ---------------------------------------- a reward that is fooled
def test_a_reward_that_rises_while_replies_get_worse_ends_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With next to no KL penalty, and a second measure that is known: it rises to update 3 and falls by 3 % a look.

    It is told of and ended before the measure has lost a tenth of its best, and the weights of update 3 are kept.
    """
    known = iter([0.40, 0.55, 0.70, 0.80, 0.776, 0.753, 0.730, 0.60, 0.50, 0.40, 0.30])
    shown: list[float] = []
    weights: list[dict[str, torch.Tensor]] = []
    log = Updater.go_to

    def measure(prompts: Any, texts: Any, replies: Any) -> list[dict[str, float]]:
        shown.append(next(known))
        return [{"score": shown[-1]} for _ in prompts]

    monkeypatch.setattr(
        Updater, "go_to", lambda self, step: (weights.append(self.weights()), log(self, step))[1]
    )  # called before the passes of every update, and once at the end
    options = {"kl_coef": 0.001, "updates": 10, "lr": 2e-3, "eval_every": 1, "patience": 3, "missing_eos_penalty": 1.0}
    found = went(tmp_path, loves_words, gold=measure, **options)
    assert shown[-1] >= 0.9 * max(shown) and len(shown) == 7
    assert found.result["stopped_on_monitor"] == 1 and found.result["best_update"] == 3
    assert found.result["held_out"]["measure"] == 0.80
    kept = dict(found.roles.policy.named_parameters())
    after = {name.removeprefix("policy."): tensor for name, tensor in weights[3].items()}
    assert after and all(torch.equal(kept[name], tensor) for name, tensor in after.items())
    last = {name.removeprefix("policy."): tensor for name, tensor in weights[-1].items()}
    assert any(not torch.equal(kept[name], tensor) for name, tensor in last.items())
    named(found, "reward_hacked", "update 3 is kept", "kl_coef")
    assert found.warned["reward_hacked"][0].startswith("at update 5, "), "at the second look of the fall"


def test_a_part_that_is_given_up_for_another_is_named(tmp_path: Path) -> None:
    """The measure as a whole rises throughout, so that nothing is fooled by it; its topic falls from 0.8 to 0.5."""
    topic = iter([0.8, 0.7, 0.65, 0.59, 0.61, 0.59, 0.55, 0.5, 0.5, 0.5, 0.5])
    whole = iter(range(11))

    def measure(prompts: Any, texts: Any, replies: Any) -> list[dict[str, float]]:
        found = {"score": next(whole) / 10, "topic": next(topic), "persona": 0.1}
        return [found for _ in prompts]

    found = went(tmp_path, has_word, gold=measure, updates=10, eval_every=1, missing_eos_penalty=1.0, kl_coef=0.05)
    assert list(found.warned) == ["part_given_up"] and found.result["best_update"] == 10
    named(found, "part_given_up", "topic fell from 0.8 at the start to 0.55", "pairs whose rejected reply lacks it")
    assert found.warned["part_given_up"][0].startswith("at update 6, "), "at the second look in a row below 0.6"
