"""Reward shaping: the order normalise, clip, penalise is the contract."""

from __future__ import annotations

import pytest
import torch

from reward.shaping import shape_rewards


def test_each_step_by_hand() -> None:
    scores_B = torch.tensor([3.0, 3.0, 101.0, 101.0, -99.0])
    finished_B = torch.tensor([True, False, True, False, True])
    shaped_B = shape_rewards(scores_B, finished_B, mean=1.0, std=2.0, clip=10.0, missing_eos_penalty=1.0)
    assert shaped_B.tolist() == [1.0, 0.0, 10.0, 9.0, -10.0]
    assert shaped_B.dtype == torch.float32


def test_penalty_is_felt_below_the_clip() -> None:
    shaped_B = shape_rewards(torch.tensor([-50.0]), torch.tensor([False]), 0.0, 1.0, 5.0, 1.0)
    assert shaped_B.tolist() == [-6.0]


def test_no_clip() -> None:
    assert shape_rewards(torch.tensor([50.0]), torch.tensor([True]), 0.0, 1.0, None, 1.0).tolist() == [50.0]


@pytest.mark.parametrize(
    ("mean", "std", "clip"), [(0.0, 0.0, 1.0), (0.0, -1.0, 1.0), (float("nan"), 1.0, 1.0), (0.0, 1.0, 0.0)]
)
def test_meaningless_options_are_refused(mean: float, std: float, clip: float) -> None:
    with pytest.raises(ValueError):
        shape_rewards(torch.zeros(1), torch.ones(1, dtype=torch.bool), mean, std, clip, 1.0)


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        shape_rewards(torch.zeros(2), torch.ones(1, dtype=torch.bool), 0.0, 1.0, None, 1.0)
