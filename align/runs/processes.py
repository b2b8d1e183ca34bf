"""The processes that a launcher has started for one run: they work on it together, or it is refused.

Where one of them fails, it says why, and the others end with one line as they wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from data_prep.core.errors import TrainingStopped, UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers write how many processes they have started."""


def launched() -> int:
    """How many processes a launcher says it has started; 1 without one."""
    return next((int(found) for name in _SIZES if (found := os.environ.get(name, "")).isdecimal()), 1)


@contextmanager
def together(process: Accelerator) -> Iterator[None]:
    """Work that several processes do together: where another of them has ended, what it owed is not to be had.

    Raises:
        TrainingStopped: another process has ended.
    """
    try:
        yield
    except RuntimeError as problem:
        if process.num_processes == 1 or not _left_alone(problem):
            raise
        raise TrainingStopped(
            "another process of the run has ended",
            code="process_ended",
            hint="its own message says why; what was kept until then stays",
        ) from None


def _left_alone(problem: RuntimeError) -> bool:
    """Whether a collective operation failed: gloo raises errors without a class of their own."""
    from torch.distributed import DistError

    return isinstance(problem, DistError) or "gloo/" in str(problem)


def join_processes() -> Accelerator:
    """This process among those that work on the run together; they wait for one another here.

    Raises:
        UserError: the environment tells of several processes, but they would not work together.
    """
    count = launched()
    meet = all(os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))
    if count > 1 and not meet:
        raise _apart(count, 1)
    from torch import accelerator as device

    from align.training.processes import Processes

    kind = device.current_accelerator() if device.is_available() else None
    # Without a device that has a backend of its own, accelerate joins processes only where it is told to use the CPU.
    cpu = count > 1 and (kind is None or kind.type == "mps")
    process = Processes(cpu=cpu, mixed_precision="no", kwargs_handlers=_met_anew() if count > 1 else [])
    if process.num_processes != count:
        raise _apart(count, process.num_processes)
    return process


def _met_anew() -> list[Any]:
    """How processes that a launcher has started again meet: apart from what those before them left in its store.

    torchrun's agent keeps one store over its restarts, and a process that is quick would find the address of a peer
    that is dead there (torch 2.13; seen as a hang, or as `connectFullMesh failed`).
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0":
        return []
    from accelerate.utils import InitProcessGroupKwargs
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    how = {"store": PrefixStore(f"restart-{restarts}", store), "rank": rank, "world_size": size}
    handler = InitProcessGroupKwargs()
    vars(handler)["to_kwargs"] = lambda: how  # accelerate knows its own classes alone, and they can name no store
    return [handler]


def _apart(count: int, joined: int) -> UserError:
    return UserError(
        f"{count} processes were launched, but {joined} would work on the run",
        code="processes",
        field="WORLD_SIZE",
        hint="launch them with torchrun or accelerate launch, or unset WORLD_SIZE to use one process",
    )
