"""Rows, objectives and updaters of the size that tests of the optimisation loop need."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from accelerate import Accelerator

from align.config.schema import Load
from align.rl.actor_critic import ActorCritic, ExperienceRow, PPOLoss
from align.roles import Role
from align.stages.base import TrainingStage
from align.training.objectives import LanguageModeling, Objective, Pairwise
from align.training.optimizer import Updater
from align.training.options import Optimizer
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


OBJECTIVES = [supervised, pairwise, actor_critic]


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
