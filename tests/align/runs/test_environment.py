"""What a run records of the machine it ran on."""

from __future__ import annotations

import getpass
import json
import platform

from align.runs.environment import facts


def test_the_machine_is_described_without_names_of_host_or_user() -> None:
    found = facts("cpu")
    assert found.keys() == {"system", "processor", "cores", "memory_bytes", "device"} and found["device"] == "cpu"
    assert isinstance(found["cores"], int) and found["cores"] >= 1
    assert isinstance(found["memory_bytes"], int) and found["memory_bytes"] > 2**28
    told = json.dumps(found)
    assert platform.node() not in told and getpass.getuser() not in told.split('"')
