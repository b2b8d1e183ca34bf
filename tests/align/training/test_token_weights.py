"""Weights of messages: a weighted mean over tokens, exact against the plainest computation there is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from align.training.loop import fit
from data_prep.rendering.renderer import Renderer
from data_prep.types import Conversation, Message
from tests.align.training.test_loop import double_precision  # noqa: F401
from tests.tiny import tiny_tokenizer
from tests.tiny_training import gradients, options, supervised, updater

WEIGHTS = (0.25, 2.0, 1.0, 0.5)


def weighted(rows):
    """Every second row with weights that change from token to token; the others without any."""
    return [
        row
        if i % 2
        else replace(row, weights=[WEIGHTS[(i + j) % 4] if kept else 0.0 for j, kept in enumerate(row.mask)])
        for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize("micro", [1, 3, 16])
def test_loss_and_gradient_are_those_of_a_weighted_mean(micro, double_precision):  # noqa: F811
    objective, rows = supervised()
    objective.double()
    rows = weighted(rows)
    numbers = {}
    chosen = options(micro_batch_size=micro)
    fit(updater(objective, chosen, 1), rows, [], 0, lambda step, split, n: numbers.update(n))
    found = gradients(objective)

    plain, _ = supervised()
    plain.double()
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for row in rows:
        logits = plain.role.tree(torch.tensor([row.ids])).logits[0]
        logprobs = torch.log_softmax(logits.double(), -1)
        for place in range(1, len(row.ids)):
            if row.mask[place]:
                w = 1.0 if row.weights is None else row.weights[place]
                total = total - w * logprobs[place - 1, row.ids[place]]
                weight += w
    mean = total / weight
    assert numbers["loss"] == pytest.approx(float(mean.detach()), rel=1e-12)
    mean.backward()
    parameters = dict(plain.named_parameters())
    assert found
    for name, gradient in found.items():
        scale = float(gradient.abs().max())
        assert float((parameters[name].grad - gradient).abs().max()) <= 1e-10 * scale, name


def test_weights_of_1_change_nothing_and_weight_0_is_train_false():
    objective, rows = supervised()
    plain = objective.collate(rows)
    ones = objective.collate([replace(row, weights=[1.0] * len(row.ids)) for row in rows])
    assert float(objective(plain)[0].detach()) == float(objective(ones)[0].detach()) and plain.weight == ones.weight
    renderer = Renderer(tiny_tokenizer())

    def tokens(**said):
        turns = (
            Message("user", "a"),
            Message("assistant", "b", **said),
            Message("user", "c"),
            Message("assistant", "d"),
        )
        return renderer.conversation(Conversation(turns, "f:1"))

    assert tokens(weight=0.0) == tokens(train=False) and tokens(weight=0.0).weights is None
    assert tokens(weight=1.0) == tokens(weight=None)
    half = tokens(weight=0.5)
    assert half.ids == tokens().ids and half.mask == tokens().mask
    assert {w for w, kept in zip(half.weights, half.mask, strict=True) if kept} == {0.5, 1.0}
    assert sum(w == 0.5 for w in half.weights) == len(renderer.reply("b"))
