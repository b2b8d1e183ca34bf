"""The processes that a launcher has started for one run: they work on it together, or it is refused."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from data_prep.core.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers write how many processes they have started."""


def join_processes() -> Accelerator:
    """This process among those that work on the run together; they wait for one another here.

    Raises:
        UserError: the environment tells of several processes, but they would not work together.
    """
    launched = next((int(found) for name in _SIZES if (found := os.environ.get(name, "")).isdecimal()), 1)
    together = all(os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))
    if launched > 1 and not together:
        raise _apart(launched, 1)
    from torch import accelerator as device

    from align.training.processes import Processes

    kind = device.current_accelerator() if device.is_available() else None
    # Without a device that has a backend of its own, accelerate joins processes only where it is told to use the CPU.
    process = Processes(cpu=launched > 1 and (kind is None or kind.type == "mps"), mixed_precision="no")
    if process.num_processes != launched:
        raise _apart(launched, process.num_processes)
    return process


def _apart(launched: int, joined: int) -> UserError:
    return UserError(
        f"{launched} processes were launched, but {joined} would work on the run",
        code="processes",
        field="WORLD_SIZE",
        hint="launch them with torchrun or accelerate launch, or unset WORLD_SIZE to use one process",
    )
