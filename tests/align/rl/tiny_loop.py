"""The whole update loop of PPO on a tiny policy that has learned to answer: what a stage does, without a run folder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from align.checkpoints.compatibility import ParentMode
from align.config.registries import adapters
from align.config.schema import Load
from align.rl.experience import PPORoles, RewardRule
from align.rl.gold import Gold
from align.rl.held_out import HeldOut
from align.rl.options import Estimator
from align.rl.ppo import improve
from align.rl.signals.base import Said, Scorer, Signal, SignalOptions, Site, Source
from align.rl.signals.weighed import Signals
from align.roles import Role
from align.stages.ppo import PPO
from align.training.loop import fit
from align.training.objectives import LanguageModeling
from align.training.options import Optimizer
from data_prep.options import DataOptions
from data_prep.types import PromptTokens, Tokens
from tests.tiny import save_tiny_llama
from tests.tiny_chain import HOME, bases
from tests.tiny_training import options, process, updater

END, ASK = 1, 50
WORDS = range(20, 28)
"""What the talker says, two to five of them, and the end."""
Score = Callable[[list[int], bool], float]
"""Token ids of a reply, whether it ended -> its reward."""
MODE = ParentMode(None, Load.fp32)


def prompt(number: int) -> list[int]:
    return [10 + number % 8, ASK]


@cache
def talker(ends: bool = True) -> Path:
    """A base that answers with a few words; without `ends` it was tuned on rows whose end is missing."""
    folder = save_tiny_llama(HOME / f"talker-{ends}", seed=4)
    role = bases(folder).fresh(None, adapters.get("full")(), MODE, "policy")
    drawn, rows = np.random.default_rng(0), []
    for number in range(64):
        reply = drawn.choice(WORDS, size=drawn.integers(2, 6)).tolist()
        ids = [*prompt(number), *reply, *([END] if ends else drawn.choice(WORDS, size=6).tolist())]
        rows.append(Tokens(ids, [False] * 2 + [True] * (len(ids) - 2), str(number)))
    chosen = options(optimizer=Optimizer.adamw, lr=1e-2, max_steps=60, max_grad_norm=1.0)
    fit(updater(LanguageModeling(role), chosen, 60, lr=1e-2), rows, [], 0, lambda *_: None)
    role.tree.save_pretrained(folder)
    return folder


class Planted(Source):
    """A signal made of a function."""

    def __init__(self, score: Score) -> None:
        self._score = score

    def open(self, where: str, site: Site) -> Scorer:
        def score(said: Said) -> list[dict[str, float]]:
            replies = [[int(word) for word in text.split()] for text in said.texts]
            return [{"score": self._score(*one)} for one in zip(replies, said.finished, strict=True)]

        return score


@dataclass
class Went:
    """How a stage went: what it warned of, its last numbers, its roles, and what was logged."""

    warned: dict[str, tuple[str, str]] = field(default_factory=dict)
    """code -> (message, hint)."""
    result: dict[str, Any] = field(default_factory=dict)
    roles: PPORoles | None = None
    logged: list[tuple[int, str, dict[str, float]]] = field(default_factory=list)


def went(
    folder: Path,
    score: Score,
    gold: Gold | None = None,
    norm: tuple[float, float] = (0.0, 1.0),
    spoiled: Callable[[Role], None] | None = None,
    method: str = "full",
    base: Path | None = None,
    **given: Any,
) -> Went:
    """Let the talker learn what `score` rewards.

    Args:
        gold: measures held-out replies.
        norm: mean and deviation that scores are counted in.
        spoiled: makes of the policy what it should not be, before the first update.
    """
    own = {"advantage": "reinforce_pp", "updates": 8, "batch_size": 32, "minibatches": 2, "ppo_epochs": 1, "lr": 2e-3}
    own |= {"max_new_tokens": 8, "temperature": 1.0, "kl_coef": 0.02, "missing_eos_penalty": 0.0, **given}
    stage = PPO(**{**own, "advantage": Estimator(own["advantage"])})
    found, seen = bases(base or talker()), Went()
    policy = found.fresh(None, adapters.get(method)(), MODE, "policy")
    if spoiled is not None:
        spoiled(policy)
    roles = seen.roles = PPORoles(policy, found.start_of(None, MODE, "reference"), None, None)
    context: Any = SimpleNamespace(
        accelerator=process(),
        seed=3,
        lr=stage.lr,
        is_main=True,
        staging=folder,
        parent_mode=MODE,
        judges=[],
        spec=SimpleNamespace(name="ppo", stage=stage),
        config=SimpleNamespace(model=SimpleNamespace(lr_scale=1.0)),
        renderer=SimpleNamespace(end_token_id=END, pad_token_id=0, decode=lambda ids: " ".join(map(str, ids))),
        answering=lambda role: nullcontext(),
        saver=SimpleNamespace(step=0, restore=lambda _: {}, offer=lambda *_: None),
        metrics=SimpleNamespace(log=lambda step, split, numbers: seen.logged.append((step, split, dict(numbers)))),
        phase=lambda _: nullcontext(),
        autocast=nullcontext,
        warn=lambda code, message, hint=None: seen.warned.setdefault(code, (message, hint)),
    )
    signal = Signal("planted", "stages.ppo.reward", SignalOptions(), Planted(score))
    signals = Signals([signal], Site(DataOptions()), context.renderer.decode)
    how = {"clip": stage.reward_clip, "missing_eos_penalty": stage.missing_eos_penalty, "estimator": stage.advantage}
    rule = RewardRule(stage.kl_coef, *norm, gamma=1.0, lam=1.0, temperature=stage.temperature, signals=signals, **how)
    prompts = [PromptTokens(prompt(i), str(i), f"p:{i}") for i in range(stage.batch_size)]
    held_out = HeldOut(context, prompts[:16], roles, gold) if gold is not None else None
    torch.manual_seed(0)
    seen.result = improve(context, prompts, roles, rule, stage._updater(context, roles), held_out)
    return seen
