"""Runs on a graphics card, one that is simulated: `tests/gpu_cases.py`, in a process that has the device."""

from __future__ import annotations

from tests.processors import SETTINGS, run


def test_what_runs_ask_of_a_graphics_card():
    code, said = run(SETTINGS[-1], ["-n", "0", "-p", "tests.simulated_gpu", "tests/gpu_cases.py"], {})
    assert code == 0, said[-5000:]
