"""The one thread of a server that computes: rows that wait join those at work before every token.

Requests come from other threads. They hand in rows and texts to score, are told when something has changed, and take a
row back by marking it as left.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from align.inference.open_batch import OpenBatch, Row
from align.inference.scoring import normalised, score_replies
from align.roles import Role
from align.serving.served import Served
from data_prep.core.errors import UserError

READ = 8192
"""Most prompt tokens that are read in one pass; a longer prompt is read alone."""


@dataclass(eq=False)
class Scoring:
    """Replies that a reward model is asked about."""

    judge: str
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    """(prompt, reply) ids."""
    told: Callable[[], None] = lambda: None
    """Called at the end, in the thread that computes."""
    rewards: list[float] = field(default_factory=list)
    over: bool = False
    problem: Exception | None = None

    def end(self, problem: Exception | None = None) -> None:
        """The rewards are there, or never will be."""
        self.problem, self.over = problem, True
        self.told()


class Engine:
    """Computes replies and rewards for a server, until it is told to leave."""

    def __init__(self, served: Served, batch: int, waiting: int) -> None:
        self.leaving = threading.Event()
        """Set to end: rows at work and waiting end with a problem."""
        self._served = served
        self._most, self._most_waiting = batch, waiting
        self._changed = threading.Condition()
        self._waiting: deque[Row] = deque()
        self._scorings: deque[Scoring] = deque()
        self._batches: dict[Role, OpenBatch] = {}
        self._thread = threading.Thread(target=self._work, name="align serve", daemon=True)

    def start(self) -> None:
        """Begin to compute."""
        self._thread.start()

    def stop(self) -> None:
        """End all rows, and the thread."""
        self.leaving.set()
        with self._changed:
            self._changed.notify()
        self._thread.join()

    @property
    def working(self) -> int:
        """How many rows are at work."""
        return sum(len(batch.rows) for batch in self._batches.values())

    def require_room(self, rows: int) -> None:
        """Refuse rows that there is no room for.

        Raises:
            UserError: too many wait already, or the server is leaving.
        """
        if self.leaving.is_set():
            raise UserError("the server is leaving", code="leaving")
        with self._changed:
            for row in [row for row in self._waiting if row.left]:
                self._waiting.remove(row)
            waiting = len(self._waiting)
        if waiting + rows > self._most_waiting:
            raise UserError(
                f"{waiting} replies wait already, at most {self._most_waiting} may",
                code="busy",
                hint="ask again later",
            )

    def submit(self, rows: Sequence[Row]) -> None:
        """Let rows wait for their turn.

        Raises:
            UserError: as `require_room`.
        """
        with self._changed:
            self.require_room(len(rows))
            self._waiting.extend(rows)
            self._changed.notify()

    def score(self, scoring: Scoring) -> None:
        """Let a reward model read replies."""
        with self._changed:
            if self.leaving.is_set():
                raise UserError("the server is leaving", code="leaving")
            self._scorings.append(scoring)
            self._changed.notify()

    # ------------------------------------------------------------------------------------------------- the own thread
    def _work(self) -> None:
        while not self.leaving.is_set():
            with self._changed:
                self._changed.wait_for(lambda: self.leaving.is_set() or self._waiting or self._scorings or self.working)
                rows, scorings = self._next_rows(), list(self._scorings)
                self._scorings.clear()
            for scoring in scorings:
                self._score(scoring)
            self._admit(rows)
            for batch in self._batches.values():
                if batch.rows:
                    with _ending(batch.end):
                        batch.step()
        problem = UserError("the server is leaving", code="leaving")
        with self._changed:
            for row in self._waiting:
                row.end(problem)
            for scoring in self._scorings:
                scoring.end(problem)
        for batch in self._batches.values():
            batch.end(problem)

    def _next_rows(self) -> list[Row]:
        """The rows that join now, in the order in which they came."""
        free, room, found = self._most - self.working, READ, list[Row]()
        while self._waiting and len(found) < free:
            if self._waiting[0].left:
                self._waiting.popleft()
                continue
            room -= len(self._waiting[0].prompt)
            if room < 0 and found:
                break
            found.append(self._waiting.popleft())
        return found

    def _admit(self, rows: Sequence[Row]) -> None:
        """Read the prompts, those of one role together."""
        groups: dict[Role, list[Row]] = {}
        for row in rows:
            groups.setdefault(self._served.mixed.role_of(row.adapter), []).append(row)
        for role, own in groups.items():
            if role not in self._batches:
                self._batches[role] = OpenBatch.of(self._served.mixed, own[0].adapter)
            batch = self._batches[role]
            with _ending(batch.end, *(row.end for row in own)):
                batch.admit(own)

    def _score(self, scoring: Scoring) -> None:
        with _ending(scoring.end):
            judge, role = self._served.judges[scoring.judge]
            scoring.rewards = normalised(score_replies(role, scoring.pairs, self._most), judge)
            scoring.end()


@contextmanager
def _ending(*ends: Callable[[Exception], None]) -> Iterator[None]:
    """Whatever goes wrong inside ends what it was for, and the server goes on."""
    try:
        yield
    except Exception as problem:
        print(f"align: {type(problem).__name__}: {' '.join(str(problem).split())}", file=sys.stderr, flush=True)
        for end in ends:
            end(problem)
