"""Devices by name, and the memory that each of them has for a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_prep.core.errors import UserError, nearest

GIB = 2**30
GPUS = {
    "t4": 15,
    "rtx3090": 24,
    "rtx4090": 24,
    "a10": 23,
    "l4": 22,
    "rtx5090": 31,
    "a100_40": 39,
    "l40s": 44,
    "a100": 79,
    "h100": 79,
    "h200": 139,
    "b200": 178,
}
"""Name -> GiB that its driver shows."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(gb|gib|g)")


@dataclass(frozen=True)
class Device:
    """What a run would compute on."""

    name: str
    kind: str
    """cpu or cuda."""
    bytes: int
    """Memory that a run can have."""
    processor: str = ""
    """Of a CPU, its name."""

    def did(self, machine: Mapping[str, Any]) -> bool:
        """Whether a run was on such a device, as its record says."""
        told = str(machine.get("device", "")).lower().replace(" ", "")
        if self.kind == "cpu":
            return told == "cpu" and machine.get("processor") == self.processor
        return self.name.lower().replace(" ", "") in told


def device_of(name: str, here: Mapping[str, Any]) -> Device:
    """The device of a name; `auto` is this machine's.

    Args:
        here: what `align/runs/environment.py:facts` says of this machine.

    Raises:
        UserError: no such device.
    """
    key = name.lower()
    if key == "auto" and "device_memory_bytes" in here:
        return Device(str(here["device"]), "cuda", int(here["device_memory_bytes"]))
    if key in ("auto", "cpu"):
        return Device("cpu", "cpu", int(here["memory_bytes"]), str(here["processor"]))
    if key in GPUS:
        return Device(key, "cuda", GPUS[key] * GIB)
    if found := _SIZE.fullmatch(key):
        return Device(name, "cuda", int(float(found[1]) * (GIB if found[2] == "gib" else 1e9)))
    near = nearest(key, [*GPUS, "cpu"])
    raise UserError(
        f"unknown device '{name}'",
        field="device",
        code="unknown_device",
        hint=f"did you mean '{near}'?" if near else f"cpu, a size such as 24GB, or one of {', '.join(GPUS)}",
    )
