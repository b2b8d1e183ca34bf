"""Chunks of records rendered one after another or by worker processes; the result is the same, in the same order."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, TypeVar

from data_prep.core.errors import UserError
from data_prep.prepare.arrow_rows import to_batch
from data_prep.prepare.render_chunk import Chunks, RenderedChunk

T = TypeVar("T")
CHUNK = 256
"""Records in a chunk: small enough for the tokenizer's caches, large enough to be sent."""
MANY = 10_000
"""From here on rows are worth worker processes, a file of their own and the cache."""
RARELY = (200_000, 20, 20)
"""Allocations before the youngest objects are looked through, and how often the older ones are."""

_render: Chunks | None = None


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@contextmanager
def _few_collections() -> Iterator[None]:
    """While rows are read and rendered, garbage is looked for rarely: it took a fifth of the time.

    Rows are no garbage until they are used up, and then they go by themselves.
    """
    before = gc.get_threshold()
    gc.set_threshold(*RARELY)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def chunked(records: Iterable[T], size: int = CHUNK) -> Iterator[list[T]]:
    """Lists of so many records."""
    stream = iter(records)
    while chunk := list(islice(stream, size)):
        yield chunk


def rendered(
    render: Chunks, chunks: Iterable[Sequence[Any]], workers: int | None, *, likely_many: bool = False
) -> Iterator[RenderedChunk]:
    """Every chunk's rows, in order.

    Of fewer than `MANY` records they stand in `RenderedChunk.rows` as lists. Of more they come as Arrow record batches
    (or as an empty list), made by worker processes; `MANY` records are read before it is known.

    Args:
        render: what a chunk becomes.
        chunks: lists of records.
        workers: worker processes; 0: none, None: one for each core.
        likely_many: start the processes at once, while the first records are read.

    Raises:
        UserError: a worker process died.
    """
    with _few_collections(), _Workers(render, cores() if workers is None else workers) as pool:
        if likely_many:
            pool.start()
        chunks = iter(chunks)
        first: deque[Sequence[Any]] = deque()
        read = 0
        for chunk in chunks:
            first.append(chunk)
            read += len(chunk)
            if read >= MANY:
                yield from pool.work(chain(_emptied(first), chunks))
                return
        yield from map(render, _emptied(first))


def _emptied(waiting: deque[T]) -> Iterator[T]:
    """What waits, held no longer than needed."""
    while waiting:
        yield waiting.popleft()


class _ApartProcess(SpawnProcess):
    """A process that does not import the script that started it.

    It needs nothing of that script, and one without `if __name__ == "__main__":` would run a second time in it: the
    worker would end before it had read what it is sent, and its parent would wait for ever.
    """

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        main = vars(sys.modules["__main__"])
        kept: dict[str, Any] = {name: main[name] for name in ("__file__", "__spec__") if name in main}
        main.update(dict.fromkeys(kept))
        try:
            return SpawnProcess._Popen(process_obj)
        finally:
            main.update(kept)


class _Apart(SpawnContext):
    """Starts such processes."""

    Process = _ApartProcess


class _Workers:
    """Processes that render chunks; started when they are first needed, ended with the block.

    Args:
        render: what a chunk becomes.
        number: how many processes; 0: this one renders.
    """

    def __init__(self, render: Chunks, number: int) -> None:
        self._render, self._number = render, number
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self) -> None:
        """Start the processes; they get ready while this one goes on."""
        if self._pool is None and self._number:
            self._pool = ProcessPoolExecutor(self._number, _Apart(), initializer=_begin, initargs=(self._render,))
            for _ in range(self._number):
                self._pool.submit(os.getpid)

    def work(self, chunks: Iterable[Sequence[Any]]) -> Iterator[RenderedChunk]:
        """Every chunk's rows, in order.

        Raises:
            UserError: a process died.
        """
        self.start()
        if self._pool is None:
            yield from (_batched(self._render(chunk)) for chunk in chunks)
            return
        waiting: deque[Future[RenderedChunk]] = deque()
        try:
            for chunk in chunks:
                waiting.append(self._pool.submit(_work, chunk))
                if len(waiting) >= 3 * self._number:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as problem:
            raise UserError(
                "a worker process that renders rows died (out of memory?)",
                code="worker_died",
                hint="set data.workers=0 to render in the main process",
            ) from problem


def _begin(render: Chunks) -> None:
    """Set up a worker: an interrupt is the main process's business, and it must not outlive that process."""
    global _render
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _render = render
    gc.freeze()
    gc.set_threshold(*RARELY)


def _end_with_parent() -> None:
    from multiprocessing import connection, parent_process

    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work(chunk: Sequence[Any]) -> RenderedChunk:
    assert _render is not None
    return _batched(_render(chunk))


def _batched(part: RenderedChunk) -> RenderedChunk:
    part.rows, part.flat = to_batch(part.rows, part.flat) if part.rows else [], {}
    return part
