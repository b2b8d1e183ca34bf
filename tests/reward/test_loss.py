"""The pair loss and the score head, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from reward.head import ScalarHead
from reward.loss import bradley_terry


def test_equal_scores_cost_log_two() -> None:
    loss_B = bradley_terry(torch.tensor([0.5]), torch.tensor([0.5]))
    assert loss_B.tolist() == pytest.approx([math.log(2)])


def test_hand_computed_pairs() -> None:
    """c - r = log 3 gives p = 3/4; c - r = -log 3 gives p = 1/4."""
    chosen_B, rejected_B = torch.tensor([math.log(3), 0.0]), torch.tensor([0.0, math.log(3)])
    assert bradley_terry(chosen_B, rejected_B).tolist() == pytest.approx([math.log(4 / 3), math.log(4)])


def test_margin_is_subtracted_from_the_gap() -> None:
    loss_B = bradley_terry(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([1.0]))
    assert loss_B.tolist() == pytest.approx([math.log(2)])


def test_centering_pulls_the_sum_to_zero() -> None:
    loss_B = bradley_terry(torch.tensor([1.5]), torch.tensor([1.5]), centering=0.1)
    assert loss_B.tolist() == pytest.approx([math.log(2) + 0.1 * 9.0])


def test_loss_is_fp32_and_finite_for_huge_gaps() -> None:
    chosen_B = torch.tensor([-500.0], dtype=torch.bfloat16)
    loss_B = bradley_terry(chosen_B, -chosen_B)
    assert loss_B.dtype == torch.float32
    assert loss_B.tolist() == pytest.approx([1000.0])


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="of one shape"):
        bradley_terry(torch.zeros(2), torch.zeros(1))
    with pytest.raises(ValueError, match="of one shape"):
        bradley_terry(torch.zeros(2), torch.zeros(2), torch.zeros(1))


def test_gradient_is_that_of_the_logistic() -> None:
    chosen_B = torch.tensor([math.log(3)], requires_grad=True)
    bradley_terry(chosen_B, torch.tensor([0.0])).sum().backward()
    assert chosen_B.grad is not None
    assert chosen_B.grad.tolist() == pytest.approx([-0.25])


def test_head_scores_by_hand() -> None:
    head = ScalarHead(3)
    with torch.no_grad():
        head.score.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
        head.score.bias.fill_(0.25)
    scores_BT = head(torch.tensor([[[1.0, 1.0, 2.0], [0.0, 0.0, 0.0]]], dtype=torch.bfloat16))
    assert scores_BT.shape == (1, 2)
    assert scores_BT.dtype == torch.float32
    assert scores_BT.tolist() == [[0.25, 0.25]]


def test_head_start_has_the_published_spread() -> None:
    torch.manual_seed(0)
    head = ScalarHead(9999)
    assert head.score.bias.item() == 0.0
    assert head.score.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_head_stays_fp32_under_autocast() -> None:
    head, hidden = ScalarHead(4), torch.full((2, 4), 1.0009765625)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores_B = head(hidden)
    assert scores_B.dtype == torch.float32
    assert torch.equal(scores_B, head(hidden))


def test_head_file_keys() -> None:
    assert {key: tuple(value.shape) for key, value in ScalarHead(4).state_dict().items()} == {
        "score.weight": (1, 4),
        "score.bias": (1,),
    }
