"""What a run says about the machine it ran on: peak memory, versions, processor; no name of user or host."""

from __future__ import annotations

import logging
import os
import platform
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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


def reset_peak_gpu(device: str) -> None:
    """Start a new measurement of the most memory that tensors take on a CUDA device; elsewhere nothing."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def free_gpu(device: str) -> None:
    """Give what a CUDA device holds for no tensor back to it; elsewhere nothing."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()


def peak_gpu(device: str) -> int | None:
    """Most bytes that tensors took on a CUDA device since `reset_peak_gpu`; None elsewhere."""
    if not device.startswith("cuda"):
        return None
    import torch

    return int(torch.cuda.max_memory_allocated(device))


@contextmanager
def kernels(deterministic: bool) -> Iterator[None]:
    """Inside, torch takes only kernels that give the same bits each time, where that is asked for."""
    if not deterministic:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by CUDA's libraries as they are first used
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def facts(device: str) -> dict[str, str | int]:
    """The machine in a few words: system, processor, cores, memory, and the `device` that the run computes on."""
    found: dict[str, str | int] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": device,
    }
    if device.startswith("cuda"):
        import torch

        found["device"] = torch.cuda.get_device_name()
        found["device_memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "BITSANDBYTES_NOWELCOME": "1",
    "WANDB_SILENT": "true",
}
"""Environment of libraries that talk too much; what the user has set stays."""
LOGGERS = ("transformers", "peft", "accelerate", "bitsandbytes")


def quieten() -> None:
    """Keep libraries from writing over progress and verdicts."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
