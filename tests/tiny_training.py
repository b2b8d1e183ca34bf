"""Rows, objectives and updaters of the size that tests of the optimisation loop need."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from accelerate import Accelerator

from align.checkpoints.compatibility import ParentMode
from align.config.schema import Load
from align.rl.actor_critic import ActorCritic, ExperienceRow, PPOLoss
from align.rl.pretraining import MixedActorCritic, Pretraining
from align.roles import Role
from align.stages.base import TrainingStage
from align.training.dpo import DirectPreference
from align.training.kto import KahnemanTversky, UnpairedRow
from align.training.objectives import LanguageModeling, Objective, Pairwise
from align.training.optimizer import Updater
from align.training.options import Optimizer
from align.training.orpo import OddsRatio
from data_prep.types import PairTokens, Tokens
from reward.head import ScalarHead
from tests.tiny_chain import bases, fresh, sentences


@cache
def process() -> Accelerator:
    return Accelerator(cpu=True)


def lora(seed: int = 0, head: bool = False, **options) -> Role:
    role = fresh("lora", Load.fp32, seed=seed, **options)
    if head:
        torch.manual_seed(seed)
        role.head = ScalarHead(role.tree.config.hidden_size)
    return role


def token_rows(count: int = 16) -> list[Tokens]:
    """Rows of unequal lengths and unequal numbers of supervised tokens."""
    made = []
    for i, ids in enumerate(sentences(count, longest=20)):
        mask = [False] + [(i + j) % 3 > 0 for j in range(len(ids) - 1)]
        mask[-1] = True
        made.append(Tokens(ids, mask, f"rows.jsonl:{i + 1}"))
    return made


def pair_rows(count: int = 16, margins: bool = False) -> list[PairTokens]:
    found = sentences(3 * count, longest=12)
    return [
        PairTokens(found[3 * i], found[3 * i + 1], found[3 * i + 2], f"pairs:{i}", 0.3 * (i % 3) if margins else None)
        for i in range(count)
    ]


def experience_rows(count: int = 16) -> list[ExperienceRow]:
    generator = np.random.default_rng(0)
    found = sentences(2 * count, longest=12)
    made = []
    for i in range(count):
        reply = found[2 * i + 1]
        numbers = generator.normal(size=(4, len(reply)))
        numbers[0] = -4.0 + 0.1 * numbers[0]
        made.append(ExperienceRow(found[2 * i], reply, *(row.tolist() for row in numbers), id=f"p:{i}"))
    return made


def supervised() -> tuple[Objective, list]:
    return LanguageModeling(lora()), token_rows()


def pairwise() -> tuple[Objective, list]:
    return Pairwise(lora(head=True), centering=0.05), pair_rows(margins=True)


def actor_critic() -> tuple[Objective, list]:
    found = bases()
    policy = fresh("lora", Load.fp32, found)
    value = fresh("vera", Load.fp32, found, seed=2)
    value.head = ScalarHead(32)
    return ActorCritic(policy, value, PPOLoss(value_coef=0.7, temperature=0.8)), experience_rows()


def mixed_actor_critic() -> tuple[Objective, list]:
    """The same with conversations beside the replies."""
    objective, rows = actor_critic()
    mixed = MixedActorCritic(objective.policy, objective.value, objective.loss, coef=0.4)
    return mixed, Pretraining(token_rows(20), seed=3).beside(rows, 0)


def policy_and_reference(seed: int = 0) -> tuple[Role, Role]:
    """A stirred LoRA policy and the frozen base under it, on one set of base weights."""
    found = bases()
    return fresh("lora", Load.fp32, found, seed=seed), found.start_of(None, ParentMode(None, Load.fp32), "reference")


def labelled_rows(count: int = 16) -> list[UnpairedRow]:
    """Two good replies for every bad one, each beside the reply of the row before it."""
    rows = pair_rows(count)
    return [
        UnpairedRow(row.prompt, row.chosen, i % 3 > 0, f"labels:{i}", rows[i - 1].chosen) for i, row in enumerate(rows)
    ]


def direct_preference() -> tuple[Objective, list]:
    objective = DirectPreference(*policy_and_reference(), label_smoothing=0.1)
    objective.sft_weight = 0.3
    return objective, pair_rows()


def odds_ratio() -> tuple[Objective, list]:
    return OddsRatio(lora(), beta=0.5), pair_rows()


def kahneman_tversky(seed: int = 2) -> tuple[Objective, list]:
    """With this seed the estimate of the KL is above 0."""
    objective = KahnemanTversky(*policy_and_reference(seed), beta=0.5, undesirable_weight=2.0)
    objective.sft_weight = 0.3
    return objective, labelled_rows()


OBJECTIVES = [supervised, pairwise, direct_preference, odds_ratio, kahneman_tversky, actor_critic]


def options(**values) -> TrainingStage:
    plain = TrainingStage(lr=1e-3, batch_size=16, optimizer=Optimizer.sgd, max_grad_norm=1e9, warmup=0.0, max_steps=1)
    return replace(plain, **values)


def updater(objective: Objective, chosen: TrainingStage, steps: int, lr: float = 1e-3) -> Updater:
    groups = [{"params": [p for p in objective.parameters() if p.requires_grad], "lr": lr}]
    return Updater(objective, groups, chosen, steps, process())


def gradients(objective: Objective) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def weights(objective: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in objective.named_parameters() if p.requires_grad}
