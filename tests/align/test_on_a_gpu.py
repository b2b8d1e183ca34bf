"""Runs on a graphics card, one that is simulated: `tests/gpu_cases.py`, in a process that has the device."""

from __future__ import annotations

import pytest

from tests.processors import SETTINGS, run
from tests.tiny_chain import grid_beyond


@pytest.mark.parametrize("marked", grid_beyond(["not grid", "grid"], ["not grid"]))
def test_what_runs_ask_of_a_graphics_card(marked):
    code, said = run(SETTINGS[-1], ["-n", "0", "-m", marked, "-p", "tests.simulated_gpu", "tests/gpu_cases.py"], {})
    assert code == 0, said[-5000:]
