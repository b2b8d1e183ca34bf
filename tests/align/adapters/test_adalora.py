"""AdaLoRA: the course of its budget, its importance scores, and what is kept of dropped directions."""

from __future__ import annotations

import torch

from align.adapters.layers.adalora import Allocation
from align.adapters.layers.lora_offset import lora_layers
from align.checkpoints.compatibility import ParentMode
from align.config.registries import adapters
from align.config.schema import Load
from align.roles import Role
from align.training.objectives import LanguageModeling
from data_prep.types import Tokens
from tests.tiny_chain import bases, logits, sentences

ROWS = [Tokens(ids, [True] * len(ids), f"row:{i}") for i, ids in enumerate(sentences(8))]


def made(**options) -> Role:
    torch.manual_seed(0)
    adapter = adapters.get("adalora")(rank=2, init_rank=4, every=2, **options)
    return bases().fresh(None, adapter, ParentMode(None, Load.fp32), "policy")


def trained(role: Role, steps: int, lr: float = 1e-2, after=None, total: int = 0) -> list[float]:
    objective = LanguageModeling(role)
    optimizer = torch.optim.AdamW(role.adapter.parameter_groups(role.carrier, lr), weight_decay=0.0)
    role.adapter.begin(role.carrier, optimizer, total or steps)
    batch, losses = objective.collate(ROWS), []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss, _ = objective(batch)
        (loss / batch.weight).backward()
        optimizer.step()
        role.adapter.after_step(role.carrier, optimizer, step + 1)
        losses.append(float(loss.detach() / batch.weight))
        if after is not None:
            after(step + 1)
    return losses


def kept(role: Role) -> int:
    return sum(int((layer.lora_E != 0).sum()) for layer in lora_layers(role.carrier).values())


def test_the_budget_falls_as_a_cube():
    course = Allocation(start=100, end=40, warmup=10, final=30, every=1, memory=0.85)
    assert [course.budget(step) for step in (0, 10, 20, 25, 30, 99)] == [100, 100, 48, 41, 40, 40]


def test_directions_are_dropped_to_the_average_rank_and_stay_dropped():
    role = made()
    layers = len(lora_layers(role.carrier))
    seen = {}
    losses = trained(role, 20, after=lambda step: seen.update({step: kept(role)}))
    assert seen[2] == 4 * layers and seen[14] == seen[20] == 2 * layers
    assert all(a >= b for a, b in zip(list(seen.values()), list(seen.values())[1:], strict=False))
    assert losses[-1] < losses[0] - 0.05
    ranks = {n: int((m.lora_E != 0).sum()) for n, m in lora_layers(role.carrier).items()}
    assert len(set(ranks.values())) > 1, "some layers must have more than others"


def test_the_most_important_directions_stay():
    """By hand: sensitivity |w g|, its running mean times its running deviation, summed as eq. 7 says."""
    role = made()
    trained(role, 1, total=20)
    layer = next(iter(lora_layers(role.carrier).values()))
    now = {"size": (layer.lora_E * layer.lora_E.grad).abs()}
    mean = 0.15 * now["size"]
    spread = (0.15 * (now["size"] - mean).abs()).detach()
    torch.testing.assert_close(layer.running["mean_size"], mean.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(layer.running["spread_size"], spread, rtol=1e-5, atol=0)


def test_it_is_continued_with_its_directions_and_read_frozen_as_a_plain_lora(tmp_path):
    role = made()
    trained(role, 20)
    role.adapter.save(role.carrier, tmp_path)
    found = bases().root(Load.fp32)
    frozen = Role("frozen", role.adapter.load(found.tree(), tmp_path, trainable=False), role.adapter)
    again = Role("again", role.adapter.load(found.tree(), tmp_path, trainable=True), role.adapter)
    assert torch.equal(logits(frozen), logits(role)) and torch.equal(logits(again), logits(role))
    before = kept(again)
    trained(again, 6)
    assert kept(again) == before and not torch.equal(logits(again), logits(role))


def test_rows_are_pulled_towards_orthogonality():
    def distance(role: Role) -> float:
        layer = next(iter(lora_layers(role.carrier).values()))
        down = layer.lora_A["default"].weight
        return float((down @ down.T - torch.eye(4)).norm())

    pulled, free = made(orthogonality=0.5), made(orthogonality=0.0)
    for role in (pulled, free):
        trained(role, 30, lr=3e-2)
    assert distance(pulled) < 0.5 * distance(free)
