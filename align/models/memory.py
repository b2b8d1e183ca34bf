"""Out of memory, told as what it is: where it happened, and what makes the pass smaller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from data_prep.core.errors import UserError

_ALLOCATORS = ("can't allocate memory", "out of memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What the errors of allocators say, where they have no type of their own: the CPU's and CUDA's libraries'."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a device or of the machine, has run out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATORS)


class OutOfMemory(UserError):
    """A pass that does not fit; `tokens` is how many it held, where that is known."""

    def __init__(self, tokens: int | None = None, where: str | None = None, hint: str | None = None) -> None:
        held = f" in a pass over {tokens} tokens" if tokens else ""
        super().__init__(f"out of memory{held}", code="out_of_memory", field=where, hint=hint)
        self.tokens = tokens


@contextmanager
def told_of(tokens: int | None = None) -> Iterator[None]:
    """Say of a pass over so many tokens that it does not fit.

    Raises:
        OutOfMemory: memory ran out inside.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(tokens) from None  # the frames of the error would keep what the pass has allocated
