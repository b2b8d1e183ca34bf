"""The optimisation loop: exact gradients under every cut, clipping, schedules, the order of rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from align.training.batching import batches
from align.training.loop import fit
from align.training.objectives import LanguageModeling
from align.training.optimizer import Updater
from align.training.options import Schedule
from tests.tiny_training import (
    OBJECTIVES,
    actor_critic,
    gradients,
    lora,
    mixed_actor_critic,
    options,
    process,
    supervised,
    token_rows,
    updater,
)

CUTS = [
    *({"micro_batch_size": rows} for rows in (16, 1, 2, 3, 5, 8)),
    *({"micro_tokens": tokens} for tokens in (1, 40, 1000)),
    {"micro_tokens": 60, "micro_batch_size": 2},
]
"""How a batch of 16 rows is cut into forward passes."""


@pytest.fixture
def double_precision(monkeypatch):
    """float64 all the way: the places that ask for float32 (norms, losses, heads) leave a float64 tensor as it is."""
    plain_to, plain_float = torch.Tensor.to, torch.Tensor.float

    def to(self, *args, **kwargs):
        if self.dtype is torch.float64 and (torch.float32 in args or kwargs.get("dtype") is torch.float32):
            return self
        return plain_to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self if self.dtype is torch.float64 else plain_float(self))


@pytest.mark.parametrize("make", [*OBJECTIVES, mixed_actor_critic], ids=lambda make: make.__name__)
def test_gradient_of_step_1_does_not_depend_on_the_cut(make, double_precision):
    found, losses = [], []
    for cut in CUTS:
        torch.manual_seed(0)
        objective, rows = make()
        objective.double()
        numbers = {}
        chosen = options(**cut)
        fit(updater(objective, chosen, 1), rows, [], 0, lambda step, split, n, into=numbers: into.update(n))
        found.append(gradients(objective))
        losses.append(numbers["loss"])
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-12)
    assert found[0] and all(float(g.abs().max()) > 0 for g in found[0].values())
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, gradient in found[0].items():
            assert gradient.dtype is torch.float64
            scale = float(gradient.abs().max())
            assert float((other[name] - gradient).abs().max()) <= 1e-10 * scale, name


def test_the_loss_is_a_mean_over_tokens_not_over_rows(double_precision):
    """Against the plainest computation there is: every row alone, log-softmax, one mean over supervised tokens."""
    objective, rows = supervised()
    objective.double()
    total = count = 0
    for row in rows:
        ids = torch.tensor([row.ids])
        logits = objective.role.carrier(input_ids=ids, use_cache=False).logits[0]
        picked = torch.log_softmax(logits[:-1], -1)[torch.arange(len(row.ids) - 1), ids[0, 1:]]
        mask = torch.tensor(row.mask[1:])
        total, count = total - picked[mask].sum(), count + int(mask.sum())
    (total / count).backward()
    plain = gradients(objective)
    numbers = {}
    fit(updater(objective, options(micro_batch_size=5), 1), rows, [], 0, lambda s, k, n: numbers.update(n))
    assert numbers["loss"] == pytest.approx(float(total / count), rel=1e-12)
    for name, gradient in gradients(objective).items():
        assert float((plain[name] - gradient).abs().max()) <= 1e-10 * float(plain[name].abs().max())


@pytest.mark.parametrize("make", OBJECTIVES[:-1], ids=lambda make: make.__name__)
def test_eval_loss_does_not_depend_on_chunks_or_order(make, double_precision):
    objective, rows = make()
    objective.double()
    runner = updater(objective, options(), 1)
    results = []
    for size in (1, 2, 3, 7, 16):
        for order in (rows, rows[::-1], sorted(rows, key=lambda row: len(row.id))):
            chunks = [objective.collate(order[i : i + size]) for i in range(0, 16, size)]
            results.append(runner.evaluate(chunks))
    for found in results[1:]:
        assert found == pytest.approx(results[0], rel=1e-9)
    assert objective.training


def test_clipping_is_of_the_whole_batch():
    chosen = options(max_grad_norm=0.01, micro_batch_size=3)
    objective, rows = supervised()
    fit(updater(objective, chosen, 1), rows, [], 0, lambda *_: None)
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients(objective).values()))
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_policy_and_value_are_clipped_apart():
    objective, rows = actor_critic()
    runner = updater(objective, options(max_grad_norm=0.01), 1)
    norms = runner.step([objective.collate(rows)])
    assert norms["grad_norm"] > 0.01 and norms["grad_norm_1"] > 0.01
    for role in (objective.policy, objective.value):
        total = math.sqrt(sum(float(p.grad.square().sum()) for p in role.parameters() if p.grad is not None))
        assert total == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("warmup", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("schedule", list(Schedule), ids=lambda schedule: schedule.value)
def test_learning_rate_at_every_step(schedule, warmup):
    steps, peak, rise = 20, 3e-3, round(20 * warmup)
    objective = LanguageModeling(lora(rank=1))
    runner = updater(objective, options(schedule=schedule, warmup=warmup), steps, lr=peak)
    window = [objective.collate(token_rows(1))]
    seen = []
    for _ in range(steps):
        assert runner.step(window)["lr"] == pytest.approx(runner.optimizer.param_groups[0]["lr"])
        seen.append(runner.optimizer.param_groups[0]["lr"] / peak)
    after = np.arange(steps - rise) / max(1, steps - rise)
    shape = {"constant": np.ones_like(after), "linear": 1 - after, "cosine": (1 + np.cos(np.pi * after)) / 2}
    expected = [*((np.arange(rise) + 1) / max(1, rise)), *shape[schedule.value]]
    np.testing.assert_allclose(seen, expected, rtol=1e-12, atol=1e-15)


def test_groups_keep_their_ratio_of_learning_rates():
    objective, rows = actor_critic()
    groups = [
        {"params": [p for p in role.parameters() if p.requires_grad], "lr": lr}
        for role, lr in ((objective.policy, 1e-4), (objective.value, 5e-4))
    ]
    runner = Updater(objective, groups, options(schedule=Schedule.linear), 4, process())
    for _ in range(4):
        runner.step([objective.collate(rows[:2])])
        first, second = (group["lr"] for group in runner.optimizer.param_groups)
        assert second == pytest.approx(5 * first)


@pytest.mark.parametrize("count", [1, 5, 16, 31, 100, 257])
def test_every_epoch_covers_every_row_once(count):
    for size in (1, 4, 16):
        for epoch in (0, 1, 7):
            found = batches(count, size, seed=3, epoch=epoch)
            assert sorted(np.concatenate(found).tolist()) == list(range(count))
            lengths = [len(part) for part in found]
            assert max(lengths) - min(lengths) <= 1 and min(lengths) >= min(size, count)
            again = batches(count, size, seed=3, epoch=epoch)
            assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    if count > 16:
        orders = {tuple(np.concatenate(batches(count, 4, seed, epoch))) for seed in (0, 1) for epoch in (0, 1, 2)}
        assert len(orders) == 6


def test_the_order_is_stateless():
    """Drawing random numbers in between, or starting at a later epoch, changes nothing."""
    first = np.concatenate(batches(50, 4, seed=1, epoch=2))
    np.random.rand(100)
    torch.rand(100)
    assert np.array_equal(first, np.concatenate(batches(50, 4, seed=1, epoch=2)))


def test_a_run_sees_the_rows_its_epochs_say():
    class Counting(LanguageModeling):
        def collate(self, rows):
            seen.extend(row.id for row in rows)
            return super().collate(rows)

    seen: list[str] = []
    chosen = options(batch_size=5, epochs=2.0, max_steps=0, micro_batch_size=2)
    steps = chosen.steps_over(16)
    fit(updater(Counting(lora(rank=1)), chosen, steps), token_rows(), [], 0, lambda *_: None)
    assert steps == 6 and len(seen) == 32
    assert sorted(seen[:16]) == sorted(seen[16:]) == sorted(row.id for row in token_rows())
