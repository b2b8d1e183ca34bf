"""The trackers of one run, each behind a process of its own: training never waits for one and none can disturb it.

An event goes into a bounded queue, a thread writes it to the process's standard input, and another thread reads what
the process answers. A tracker that raises ends with one warning; one that hangs loses rows, which are counted, and is
killed after `tracking.wait` seconds at the end. `run.json` says in `tracking[]` what became of each.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config.registries import trackers
from align.config.schema import RunConfig
from align.run_record import RunRecord
from align.tracking.trackers.base import Facts

WAITING = 20_000
"""Events that may wait for a tracker; later rows are dropped and counted."""
INTERRUPTED_WAIT = 5.0
"""Seconds that a run ended by Ctrl-C waits at most."""


@dataclass
class Track:
    """One tracker of one run: its process, and what is known of it."""

    name: str
    facts: Facts
    wait: float
    """Seconds the process may go on when the run's process is gone."""
    sent: set[str] = field(default_factory=set)
    """Digests of the stages that it holds already, from earlier calls too."""

    def __post_init__(self) -> None:
        self.status = "starting"
        self.dropped = 0
        self.known: dict[str, Any] = {}
        self.queue: queue.Queue[dict[str, Any]] = queue.Queue(WAITING)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process; a failure to do so is the tracker's failure, not the run's."""
        tracker: Any = trackers.get(self.name)
        command = [sys.executable, "-m", "align.tracking.trackers", f"{tracker.__module__}:{tracker.__qualname__}"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part or os.getcwd() for part in sys.path)}
        try:
            self.facts.own_folder.mkdir(exist_ok=True)
            with (self.facts.own_folder / f"{self.name}.log").open("ab") as log:
                self.process = subprocess.Popen(
                    [*command, str(self.wait), str(os.getpid())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    bufsize=0,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for the run, which tells its trackers
                )
        except OSError as problem:
            self._failed(str(problem))
            return
        self.threads = [threading.Thread(target=context, daemon=True) for context in (self._write, self._read)]
        for thread in self.threads:
            thread.start()
        self.send({"event": "start", **vars(self.facts)})

    def send(self, event: dict[str, Any]) -> None:
        """Hand an event over without waiting; it is counted as dropped where that cannot be done."""
        try:
            if self.status not in ("starting", "running"):
                raise queue.Full
            self.queue.put_nowait(event)
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1 and self.status in ("starting", "running"):
                _warn(f"{self.name} does not keep up; rows are dropped")

    def _write(self) -> None:
        """Thread: events from the queue to the process, as JSON lines."""
        assert self.process is not None and self.process.stdin is not None
        with contextlib.suppress(OSError), self.process.stdin as pipe:
            while True:
                event = self.queue.get()
                left = memoryview(f"{json.dumps(event)}\n".encode())
                while left:
                    left = left[pipe.write(left) :]
                if event["event"] == "finish":
                    return

    def _read(self) -> None:
        """Thread: what the process says of itself."""
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            answer = json.loads(line)
            if "stage" in answer:
                self.sent.add(answer["stage"])
            elif answer["status"] == "failed":
                self._failed(answer["error"])
            elif self.status != "abandoned":
                self.status = answer["status"]
                self.known.update({key: answer[key] for key in ("url", "dir") if answer.get(key)})
        if self.status in ("starting", "running"):
            self._failed("its process ended")

    def _failed(self, why: str) -> None:
        self.status, self.known["error"] = "failed", why
        _warn(f"{self.name} failed and is left out: {why}")

    def finish(self, status: str, deadline: float) -> None:
        """Let the tracker end until `deadline` (monotonic seconds), then end its process."""
        if self.process is None:
            return
        with contextlib.suppress(queue.Full):
            if self.status in ("starting", "running"):
                self.queue.put({"event": "finish", "status": status}, timeout=max(0.0, deadline - time.monotonic()))
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.status = "abandoned"
            _warn(f"{self.name} did not finish in time and is left behind")
        with contextlib.suppress(OSError):  # its children too, or none are left
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.threads[1].join(10.0)

    def report(self) -> dict[str, Any]:
        """What run.json says of it."""
        return {
            "name": self.name,
            "status": self.status,
            "dropped": self.dropped,
            "id": self.facts.id,
            **self.known,
            "stages": sorted(self.sent),
        }


class TrackerPool:
    """All trackers of a run. Nothing starts before `start`; without trackers every call does nothing.

    Args:
        config: the run's configuration.
        folder: the run folder.
        record: of the run; its `tracking` is kept up to date. The file itself still is what an
            earlier call left, and a tracker that was in use then goes on with its run.
        enabled: False for every process but the first.
    """

    def __init__(self, config: RunConfig, folder: Path, record: RunRecord, enabled: bool = True) -> None:
        self.record = record
        self.earlier = {str(entry["name"]): entry for entry in earlier_tracks(folder)}
        self.options = options = config.tracking
        ids = [entry["id"] for entry in self.earlier.values()]
        run_id = ids[0] if ids else secrets.token_hex(4)
        self.tracks = []
        for name in dict.fromkeys(options.to if enabled else ()):
            seen = self.earlier.get(name)
            facts = Facts(
                name=f"{options.group}-{config.name}" if options.group else config.name,
                id=run_id,
                folder=str(folder),
                resumed=seen is not None,
                config=config.resolved,
                project=options.project,
                entity=options.entity,
                group=options.group,
                tags=list(options.tags),
                mode=options.mode.name if options.mode else None,
                weights=options.weights,
            )
            self.tracks.append(Track(name, facts, options.wait, set(seen["stages"]) if seen else set()))

    def start(self) -> None:
        """Start every tracker's process."""
        for track in self.tracks:
            track.start()
        self.note()

    def row(self, row: dict[str, Any]) -> None:
        """Send one row of metrics.jsonl."""
        for track in self.tracks:
            track.send({"event": "row", "row": row})

    def stage_done(self, entry: dict[str, Any], folder: Path) -> None:
        """Send a finished stage; a skipped one only to trackers that do not hold it, and with all its rows."""
        for track in self.tracks:
            if not entry["skipped"] or entry["digest"] not in track.sent:
                facts = {"name": entry["name"], "folder": str(folder), "entry": entry}
                track.send({"event": "stage", "replay": entry["skipped"], "stage": facts})
        self.note()

    def finish(self, status: str, interrupted: bool = False) -> None:
        """End every tracker, all within `tracking.wait` seconds, and say in one line what became of them."""
        if not self.tracks:
            return
        wait = min(self.options.wait, INTERRUPTED_WAIT) if interrupted else self.options.wait
        deadline = time.monotonic() + wait
        for track in self.tracks:
            track.finish(status, deadline)
        self.note()
        print("tracking: " + ", ".join(_told(track.report()) for track in self.tracks), file=sys.stderr)

    def note(self) -> None:
        """Bring run.json's record of the trackers up to date; those of earlier calls stay."""
        entries = {**self.earlier, **{track.name: track.report() for track in self.tracks}}
        if entries:
            self.record.tracking = list(entries.values())


def earlier_tracks(folder: Path) -> list[dict[str, Any]]:
    """What run.json says of earlier trackers; [] where there is none or it cannot be read."""
    entries = RunRecord.left_in(folder).tracking
    named = {"name", "id", "stages"}
    return [each for each in entries if isinstance(each, dict) and named <= set(each)] if entries else []


def _told(report: dict[str, Any]) -> str:
    """One tracker in the closing line."""
    place = report.get("url") or report.get("dir")
    dropped = f", {report['dropped']} rows dropped" if report["dropped"] else ""
    return f"{report['name']} {report['status']}{dropped}{f' ({place})' if place else ''}"


def _warn(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"align: tracking: {text}", file=sys.stderr, flush=True)
