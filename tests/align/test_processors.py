"""The numerically delicate tests on the plainest kernels, and the settings of `make test-processors`."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.processors import ROOT, SETTINGS, TURNS, VALUES, computing_files, run


@pytest.mark.parametrize("pair", combinations(range(len(VALUES)), 2), ids=str)
def test_the_settings_are_a_pairwise_cover(pair):
    one, two = pair
    values = list(VALUES.values())
    assert {(setting[one], setting[two]) for setting in SETTINGS} == set(product(values[one], values[two]))


def test_every_test_runs_under_every_capability():
    halves = sorted((str(setting[0]), turn) for setting, turn in zip(SETTINGS, TURNS, strict=True))
    assert halves == [(name, turn) for name in ("None", "avx2", "default") for turn in (0, 1)]


def test_delicate_numbers_hold_on_the_plainest_kernels():
    """Every eighth of them; `make test-processors` takes all."""
    files = [str(path.relative_to(ROOT)) for path in computing_files(quick=True)]
    assert len(files) > 8, "the rule that chooses them finds none"
    code, said = run(SETTINGS[0], ["-n", "0", "-p", "tests.processors", *files], {"TURN": "0/8"})
    assert code == 0, said[-3000:]
