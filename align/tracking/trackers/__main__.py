"""The process of one tracker: `python -m align.tracking.trackers MODULE:CLASS SECONDS RUN`, RUN being its run's id.

Events come as JSON lines on standard input, answers go as JSON lines to what was standard output; everything that the
tracker's package prints goes to standard error, which is a log file. When the run's process dies, the tracker is told
that the run failed. The process always ends by `os._exit`, so that no exit hook of a package can keep it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from align.tracking.metrics import RESERVED, read_metrics
from align.tracking.trackers.base import Facts, StageFacts, Tracker
from data_prep.core.errors import said_by


def main() -> None:
    """Serve one tracker until the run ends."""
    place, seconds, run = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    threading.Thread(target=_end_with, args=(int(run), float(seconds)), daemon=True).start()
    try:
        module, _, name = place.partition(":")
        serve(getattr(importlib.import_module(module), name)(), sys.stdin, answers)
    except BaseException as problem:
        traceback.print_exc()
        _answer(answers, status="failed", error=f"{type(problem).__name__}: {said_by(problem)}")
    with contextlib.suppress(Exception):
        sys.stderr.flush()
    os._exit(0)


def serve(tracker: Tracker, lines: Iterable[str], answers: TextIO) -> None:
    """Hand every event to the tracker, in order; input that ends without a `finish` is a run that failed."""
    ended = False
    for line in lines:
        event: dict[str, Any] = json.loads(line)
        kind = event.pop("event")
        if kind == "start":
            _answer(answers, status="running", **tracker.start(Facts(**event)))
        elif kind == "row":
            _log(tracker, event["row"])
        elif kind == "stage":
            stage = StageFacts(**event["stage"])
            for row in read_metrics(Path(stage.folder) / "metrics.jsonl") if event["replay"] else ():
                _log(tracker, row)
            tracker.stage_done(stage)
            _answer(answers, stage=stage.entry["digest"])
        elif kind == "finish":
            tracker.finish(event["status"])
            ended = True
            break
    if not ended:
        tracker.finish("failed")
    _answer(answers, status="done")


def _log(tracker: Tracker, row: dict[str, Any]) -> None:
    values = {key: value for key, value in row.items() if key not in RESERVED}
    tracker.log(row["stage"], row["step"], row["split"], values)


def _answer(answers: TextIO, **content: Any) -> None:
    """One JSON line for the run's process, if it is still there."""
    with contextlib.suppress(OSError, ValueError):
        answers.write(json.dumps(content) + "\n")
        answers.flush()


def _end_with(parent: int, seconds: float) -> None:
    """End this process when the run's is gone (maybe before this one began) and the tracker has had its seconds."""
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(seconds)
    os._exit(1)


if __name__ == "__main__":
    main()
