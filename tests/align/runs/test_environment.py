"""What a run records of the machine it ran on."""

from __future__ import annotations

import getpass
import json
import platform
import subprocess
import sys

import pytest
import torch

from align.runs.environment import facts, kernels, peak_gpu, reset_peak_gpu


def test_the_machine_is_described_without_names_of_host_or_user() -> None:
    found = facts("cpu")
    assert found.keys() == {"system", "processor", "cores", "memory_bytes", "device"} and found["device"] == "cpu"
    assert isinstance(found["cores"], int) and found["cores"] >= 1
    assert isinstance(found["memory_bytes"], int) and found["memory_bytes"] > 2**28
    told = json.dumps(found)
    assert platform.node() not in told and getpass.getuser() not in told.split('"')


def test_the_peak_of_a_card_is_that_of_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append(device))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 * len(asked))
    reset_peak_gpu("cpu")
    assert peak_gpu("cpu") is None and not asked
    reset_peak_gpu("cuda:1")
    assert peak_gpu("cuda:1") == 7 and asked == ["cuda:1"]


def test_only_kernels_with_equal_bits_inside_and_as_before_outside() -> None:
    for wanted in (True, False):
        with kernels(wanted):
            assert torch.are_deterministic_algorithms_enabled() is wanted
        assert not torch.are_deterministic_algorithms_enabled()


def test_no_library_draws_a_bar_of_its_own() -> None:
    code = "from align.runs.environment import quieten\nquieten()\nfrom tqdm.auto import tqdm\nlist(tqdm([1, 2]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
