"""What a run says about the machine it ran on: peak memory and versions."""

from __future__ import annotations

import platform
import resource
from importlib import metadata
from pathlib import Path

PACKAGES = ("align-toolkit", "torch", "transformers", "peft", "accelerate", "trl", "bitsandbytes", "hydra-core")


def reset_peak_rss() -> None:
    """Start a new measurement of peak resident memory, where the kernel allows it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak then is the process's, which is an upper bound


def peak_rss() -> int:
    """Peak resident memory in bytes since `reset_peak_rss`."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
