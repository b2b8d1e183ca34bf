"""What several processes do together beside the optimiser's sums: take turns, and divide what has no gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from accelerate import Accelerator

from align.models.sharding import finish_passes

PartT = TypeVar("PartT")


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


@contextmanager
def one_first(process: Accelerator) -> Iterator[None]:
    """One process of each machine goes first, and the others find what it left; it fails first as well."""
    if not process.is_local_main_process:
        process.wait_for_everyone()
    try:
        yield
    finally:
        if process.is_local_main_process:
            process.wait_for_everyone()


def gathered(process: Accelerator, own: list[Any]) -> list[list[Any]]:
    """Every process's list, by process."""
    if process.num_processes == 1:
        return [own]
    import torch.distributed

    finish_passes()
    found: list[list[Any]] = [[] for _ in range(process.num_processes)]
    torch.distributed.all_gather_object(found, own)
    return found


def divided(process: Accelerator, parts: Sequence[PartT], work: Callable[[PartT], Any]) -> list[Any]:
    """What `work` makes of every part, in order; each process works on its share and holds all in the end.

    Parts are cut as for one process, so what is made of them has the same bits for any number of processes.
    """
    count = process.num_processes
    found = gathered(process, [work(part) for part in parts[process.process_index :: count]])
    return [found[place % count][place // count] for place in range(len(parts))]
