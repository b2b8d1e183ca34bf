"""Tensor maths against hand-computed numbers and slow references in float64; masked places are poisoned."""

import math

import pytest
import torch

from align.functional import (
    entropy,
    explained_variance,
    generalized_advantages,
    kl_k1,
    kl_k3,
    masked_mean,
    policy_loss,
    token_logprobs,
    value_loss,
    whiten,
)


def test_token_logprobs_by_hand_and_at_a_temperature():
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(2.0), 0.0]])
    targets = torch.tensor([1, 1])
    assert token_logprobs(logits, targets).tolist() == pytest.approx([math.log(0.75), math.log(1 / 3)], rel=1e-5)
    halved = token_logprobs(logits, targets, temperature=2.0)
    root = math.sqrt(3.0)
    assert halved[0].item() == pytest.approx(math.log(root / (1 + root)), rel=1e-5)


def test_entropy_of_a_fair_coin_and_of_a_certainty():
    logits = torch.tensor([[0.0, 0.0], [100.0, 0.0]])
    assert entropy(logits).tolist() == pytest.approx([math.log(2.0), 0.0])


def test_masked_mean_and_whiten_ignore_poison():
    values = torch.tensor([[1.0, 3.0, float("nan")], [5.0, 1e9, float("inf")]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_mean(values, mask).item() == 3.0
    white = whiten(values, mask)
    kept = white[mask]
    assert kept.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert kept.var(unbiased=False).item() == pytest.approx(1.0, abs=1e-6)
    assert (white[~mask] == 0).all()


def test_whitening_over_two_shares_is_whitening_over_their_union():
    torch.manual_seed(0)
    values, mask = torch.randn(4, 5, dtype=torch.float64), torch.rand(4, 5) < 0.7
    whole = whiten(values, mask)
    halves = [(values[:2], mask[:2]), (values[2:], mask[2:])]
    totals = iter(
        [
            mask.sum(),
            torch.where(mask, values, 0.0).sum(),
            torch.where(mask, (values - masked_mean(values, mask)) ** 2, 0.0).sum(),
        ]
    )
    share = whiten(*halves[0], reduce=lambda _: next(totals))
    assert torch.allclose(share, whole[:2], atol=1e-12)


def reference_gae(rewards, values, length, gamma, lam):
    """O(n^2): sum of discounted one-step errors, straight from the definition."""
    advantages = []
    for t in range(length):
        total = 0.0
        for k in range(t, length):
            following = values[k + 1] if k + 1 < length else 0.0
            total += (gamma * lam) ** (k - t) * (rewards[k] + gamma * following - values[k])
        advantages.append(total)
    return advantages


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_equals_the_quadratic_reference_and_reads_no_padding(gamma, lam):
    torch.manual_seed(1)
    lengths = [1, 4, 7]
    rewards, values = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    mask = torch.arange(7)[None] < torch.tensor(lengths)[:, None]
    rewards[~mask], values[~mask] = float("nan"), 1e9
    advantages, returns = generalized_advantages(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        expected = reference_gae(rewards[row].tolist(), values[row].tolist(), length, gamma, lam)
        assert advantages[row, :length].tolist() == pytest.approx(expected, abs=1e-12)
        assert returns[row, :length].tolist() == pytest.approx(
            [a + v for a, v in zip(expected, values[row].tolist(), strict=False)], abs=1e-12
        )
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_gae_by_hand():
    rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=1.0, lam=0.5)
    assert advantages.tolist() == [[-0.25 + 0.5 * 0.75, 0.75]]
    assert returns.tolist() == [[0.625, 1.0]]


def test_kl_estimators_are_unbiased_and_k3_is_never_negative():
    torch.manual_seed(2)
    p, q = torch.randn(6, dtype=torch.float64).log_softmax(0), torch.randn(6, dtype=torch.float64).log_softmax(0)
    exact = (p.exp() * (p - q)).sum()
    assert (p.exp() * kl_k1(p, q)).sum().item() == pytest.approx(exact.item())
    assert (p.exp() * kl_k3(p, q)).sum().item() == pytest.approx(exact.item())
    assert (kl_k3(p, q) >= 0).all()


def test_policy_loss_clips_only_what_goes_too_far():
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    loss, ratio, clipped = policy_loss(ratios.log(), torch.zeros(4, dtype=torch.float64), advantages, clip=0.2)
    assert ratio.tolist() == pytest.approx(ratios.tolist())
    assert loss.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8])
    assert clipped.tolist() == [True, False, False, True]


def test_a_wider_upper_clip_leaves_the_lower_bound():
    ratios = torch.tensor([1.25, 1.5, 0.5], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    loss, _, clipped = policy_loss(ratios.log(), torch.zeros(3, dtype=torch.float64), advantages, 0.2, clip_high=0.28)
    assert loss.tolist() == pytest.approx([-1.25, -1.28, 0.8]) and clipped.tolist() == [False, True, True]


def test_dual_clip_bounds_the_loss_of_negative_advantages():
    loss, _, _ = policy_loss(torch.tensor([3.0]), torch.tensor([0.0]), torch.tensor([-1.0]), 0.2, dual_clip=3.0)
    assert loss.item() == pytest.approx(3.0)


def test_policy_loss_survives_absurd_log_ratios():
    loss, ratio, _ = policy_loss(torch.tensor([500.0]), torch.tensor([-500.0]), torch.tensor([1.0]), 0.2)
    assert torch.isfinite(loss).all() and torch.isfinite(ratio).all()


def test_value_loss_by_hand():
    values, old, returns = torch.tensor([1.0, 0.1]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])
    loss, clipped = value_loss(values, old, returns, clip=0.2)
    assert loss.tolist() == pytest.approx([0.5 * 0.8**2, 0.5 * 0.9**2])
    assert clipped.tolist() == [True, False]
    assert value_loss(values, old, returns, clip=0.0)[0].tolist() == pytest.approx([0.0, 0.5 * 0.9**2])


def test_explained_variance_of_perfect_and_constant_critics():
    returns, mask = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[True, True, False]])
    assert explained_variance(returns, returns, mask).item() == 1.0
    assert explained_variance(torch.zeros(1, 3), returns, mask).item() == pytest.approx(0.0)
