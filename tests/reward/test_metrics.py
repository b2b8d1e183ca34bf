"""Statistics against published or hand-computed values."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.metrics import (
    accuracy_interval,
    calibration_bins,
    calibration_error,
    length_correlation,
    paired_difference,
    win_rate,
)


def test_wilson_by_hand() -> None:
    """8 of 10: centre (0.8 + 0.19207) / 1.38415, half-width 1.95996 / 1.38415 * sqrt(0.016 + 0.0096036)."""
    value, low, high = accuracy_interval(8, 10)
    assert (value, low, high) == pytest.approx((0.8, 0.490162, 0.943318), abs=1e-5)


def test_wilson_at_the_edges() -> None:
    assert accuracy_interval(0, 10) == pytest.approx((0.0, 0.0, 0.277533), abs=1e-5)
    assert accuracy_interval(10, 10) == pytest.approx((1.0, 0.722467, 1.0), abs=1e-5)
    for correct, n in ((0, 0), (2, 1), (-1, 1)):
        with pytest.raises(ValueError):
            accuracy_interval(correct, n)


@given(st.integers(1, 10_000), st.data())
def test_wilson_holds_its_value(n: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, n))
    value, low, high = accuracy_interval(correct, n)
    assert 0.0 <= low <= value <= high <= 1.0


def test_calibration_of_a_calibrated_model_is_zero() -> None:
    """p = 3/4 in four pairs of which three are right."""
    assert calibration_error(calibration_bins([math.log(3)] * 3 + [-math.log(3)])) == pytest.approx(0.0)
    assert calibration_error(calibration_bins([0.0, 0.0])) == 0.0


def test_calibration_by_hand() -> None:
    """Bin of 3/4: all 2 right, gap 1/4 each; bin of 0.9: 1 of 2 right, gap 0.4 each; mean (0.5 + 0.8) / 4."""
    bins = calibration_bins([math.log(3), math.log(3), math.log(9), -math.log(9)], bins=4)
    assert [(b["from"], b["to"], b["n"]) for b in bins] == [(0.75, 0.875, 2), (0.875, 1.0, 2)]  # 3/4 opens its bin
    assert [(b["confidence"], b["accuracy"]) for b in bins] == [
        (pytest.approx(0.75), 1.0),
        (pytest.approx(0.9), 0.5),
    ]
    assert calibration_error(bins) == pytest.approx(0.325)


def test_calibration_counts_every_pair_once_and_ties_half() -> None:
    margins = [0.0, 0.0, 0.3, -0.3, 2.0, 50.0, -50.0]
    bins = calibration_bins(margins)
    assert sum(b["n"] for b in bins) == len(margins)
    assert bins[0] == {"from": 0.5, "to": 0.55, "n": 2, "confidence": 0.5, "accuracy": 0.5}
    assert bins[-1]["to"] == 1.0 and bins[-1]["n"] == 2


def test_calibration_survives_huge_margins() -> None:
    assert calibration_error(calibration_bins([1e9])) == 0.0
    assert calibration_error(calibration_bins([-1e9])) == 1.0
    with pytest.raises(ValueError):
        calibration_bins([])


def test_spearman_by_hand() -> None:
    assert length_correlation([1.0, 2.0, 3.0], [10, 20, 400]) == pytest.approx(1.0)
    assert length_correlation([3.0, 2.0, 1.0], [10, 20, 400]) == pytest.approx(-1.0)
    # ranks (1, 2.5, 2.5, 4) against (1, 3, 2, 4): 4.5 / sqrt(4.5 * 5)
    assert length_correlation([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(4.5 / math.sqrt(22.5))


def test_spearman_without_spread_is_zero() -> None:
    assert length_correlation([1.0, 1.0], [3, 4]) == 0.0
    with pytest.raises(ValueError):
        length_correlation([1.0], [1, 2])


def test_paired_difference_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, sample deviation 1, error 1 / sqrt(3)."""
    assert paired_difference([2, 4, 6], [1, 2, 3]) == pytest.approx((2.0, 1 / math.sqrt(3)))
    with pytest.raises(ValueError):
        paired_difference([1.0], [1.0])


def test_win_rate_counts_ties_half() -> None:
    rate = win_rate([1, 1, 0, 3], [0, 1, 1, 2])
    assert rate["value"] == 0.625
    assert rate["n"] == 4
    assert (rate["low"], rate["high"]) == accuracy_interval(2.5, 4)[1:]
    with pytest.raises(ValueError):
        win_rate([], [])
