"""Trackers that write down what they are told, and trackers that fail in every way; told which by the run's tags."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from pathlib import Path

from align.tracking.trackers.base import Facts, StageFacts, Tracker


class Recorder(Tracker):
    """Appends every call to RUN/tracking/calls.jsonl; the tags `WHAT-CALL` make a call raise, hang, die or fill up."""

    package = "json"

    def start(self, run: Facts) -> dict[str, str | None]:
        self.tags = run.tags
        self.path = Path(run.own_folder) / "calls.jsonl"
        self._told("start", run.name, run.id, run.resumed)
        return {"dir": str(self.path)}

    def log(self, stage: str, step: int, split: str, values: dict[str, float]) -> None:
        self._told("log", stage, step, split, values)

    def stage_done(self, stage: StageFacts) -> None:
        self._told("stage", stage.name, stage.numbers)

    def finish(self, status: str) -> None:
        self._told("finish", status)

    def _told(self, call: str, *what: object) -> None:
        for tag in self.tags:
            fault, _, where = tag.partition("-")
            if where == call:
                FAULTS[fault]()
        with self.path.open("a") as file:
            file.write(json.dumps([call, *what]) + "\n")


class HangsAtOnce(Recorder):
    """Never gets as far as its first event."""

    def __init__(self) -> None:
        FAULTS["hangs"]()


def _raises() -> None:
    raise RuntimeError("broken\non two lines")


def _full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


FAULTS = {
    "raises": _raises,
    "full": _full,
    "exits": lambda: os._exit(7),
    "dies": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hangs": lambda: time.sleep(1000),
}
