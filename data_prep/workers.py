"""Chunks of records rendered one after another or by worker processes; the result is the same, in the same order."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from data_prep.chunks import Chunks, Part
from data_prep.errors import UserError
from data_prep.stored import to_batch

T = TypeVar("T")
CHUNK = 256
"""Records in a chunk: small enough for the tokenizer's caches, large enough to be sent."""
MANY = 10_000
"""From here on rows are worth worker processes, a file of their own and the cache."""

_render: Chunks | None = None


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def chunked(records: Iterable[T], size: int = CHUNK) -> Iterator[list[T]]:
    """Lists of so many records."""
    stream = iter(records)
    while chunk := list(islice(stream, size)):
        yield chunk


def rendered(render: Chunks, chunks: Iterable[Sequence[Any]], workers: int | None) -> Iterator[Part]:
    """Every chunk's rows, in order.

    Of fewer than `MANY` records they stand in `Part.rows` as lists. Of more they come as Arrow record batches (or as an
    empty list), made by worker processes; `MANY` records are read before it is known.

    Args:
        render: what a chunk becomes.
        chunks: lists of records.
        workers: worker processes; 0: none, None: one for each core.

    Raises:
        UserError: a worker process died.
    """
    chunks = iter(chunks)
    first: deque[Sequence[Any]] = deque()
    read = 0
    for chunk in chunks:
        first.append(chunk)
        read += len(chunk)
        if read >= MANY:
            break
    else:
        yield from map(render, _emptied(first))
        return
    every = chain(_emptied(first), chunks)
    number = cores() if workers is None else workers
    if number:
        yield from _in_processes(render, every, number)
    else:
        yield from (_batched(render(chunk)) for chunk in every)


def _emptied(waiting: deque[T]) -> Iterator[T]:
    """What waits, held no longer than needed."""
    while waiting:
        yield waiting.popleft()


def _in_processes(render: Chunks, chunks: Iterator[Sequence[Any]], workers: int) -> Iterator[Part]:
    from multiprocessing import get_context

    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin, initargs=(render,))
    waiting: deque[Future[Part]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_work, chunk))
            if len(waiting) >= 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as problem:
        raise UserError(
            "a worker process that renders rows died (out of memory, or a script without `if __name__ == '__main__':`)",
            code="worker_died",
            hint="set data.workers=0 to render in the main process",
        ) from problem
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(render: Chunks) -> None:
    """Set up a worker: an interrupt is the main process's business, and it must not outlive that process."""
    global _render
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _render = render
    gc.freeze()


def _end_with_parent() -> None:
    from multiprocessing import connection, parent_process

    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work(chunk: Sequence[Any]) -> Part:
    assert _render is not None
    return _batched(_render(chunk))


def _batched(part: Part) -> Part:
    part.rows = to_batch(part.rows) if part.rows else []
    return part
