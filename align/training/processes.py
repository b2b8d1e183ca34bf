"""What processes do together beside the optimiser's sums: share what one made, divide what has no gradient, and end.

Between two operations that all take part in, one of them may fail where the others do not: its disk is full, a scorer
does not answer it. The others would wait for it until somebody kills them, so such work is done `as_one`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from platform import node
from typing import Any, TypeVar

from accelerate import Accelerator

from align.models.sharding import finish_passes
from data_prep.core.errors import TrainingStopped, UserError, said_by
from data_prep.records.tally import LongRows

PartT = TypeVar("PartT")
MadeT = TypeVar("MadeT")


class Processes(Accelerator):  # type: ignore[misc]
    """accelerate's view of the processes; over a base that is cut, they meet once none of them has a pass to make."""

    def wait_for_everyone(self) -> None:
        """Wait until all processes have come here."""
        finish_passes()
        super().wait_for_everyone()

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """A tensor combined over all processes."""
        finish_passes()
        return super().reduce(tensor, reduction, scale)

    def gather(self, tensor: Any) -> Any:
        """The tensors of all processes, one after the other."""
        finish_passes()
        return super().gather(tensor)


def gathered(process: Accelerator, own: list[Any]) -> list[list[Any]]:
    """Every process's list, by process."""
    if process.num_processes == 1:
        return [own]
    import torch.distributed

    finish_passes()
    found: list[list[Any]] = [[] for _ in range(process.num_processes)]
    torch.distributed.all_gather_object(found, own)
    return found


@contextmanager
def as_one(process: Accelerator) -> Iterator[None]:
    """Work that each process does by itself; an error in one of them is raised in all, once all have come to its end.

    Raises:
        UserError, TrainingStopped: that of this process, else of the first that has one.
    """
    if process.num_processes == 1:
        yield
        return
    try:
        yield
    except Exception as problem:
        with suppress(RuntimeError):  # the others have ended too
            gathered(process, [_told(problem)])
        raise
    for told in chain.from_iterable(gathered(process, [])):
        raise told


def _told(problem: Exception) -> Exception:
    """What the others are told of an error: a line for people as it is, of anything else that it is there."""
    if type(problem) in (UserError, LongRows, TrainingStopped):
        return problem
    return TrainingStopped(
        f"another process of the run has failed ({type(problem).__name__}: {said_by(problem)})",
        code="process_ended",
        hint="its own message says more; what was kept until then stays",
    )


def divided(process: Accelerator, parts: Sequence[PartT], work: Callable[[PartT], Any]) -> list[Any]:
    """What `work` makes of every part, in order; each process works on its share and holds all in the end.

    Parts are cut as for one process, so what is made of them has the same bits for any number of processes.
    """
    count = process.num_processes
    with as_one(process):
        own = [work(part) for part in parts[process.process_index :: count]]
    found = gathered(process, own)
    return [found[place % count][place // count] for place in range(len(parts))]


def once_a_machine(process: Accelerator, work: Callable[[], MadeT]) -> MadeT:
    """What `work` makes in one process of each machine, for all that run on it."""
    machines = list(chain.from_iterable(gathered(process, [node()])))
    first = machines.index(machines[process.process_index])
    with as_one(process):
        own = [work()] if first == process.process_index else []
    made: MadeT = gathered(process, own)[first][0]
    return made


def from_main(process: Accelerator, work: Callable[[], MadeT]) -> MadeT:
    """What `work` makes in the main process, for all: somebody outside may answer each of them otherwise."""
    with as_one(process):
        own = [work()] if process.is_main_process else []
    made: MadeT = gathered(process, own)[0][0]
    return made
