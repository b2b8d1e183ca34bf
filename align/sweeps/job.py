"""One job of a sweep. It may run in this process, in another, or on another machine that sees the same folder.

Therefore nothing is handed over in memory: which sweep this is comes from Hydra's settings, what it shares with others
from sweep.json, and how it ended goes to jobs/<i>.json. Several tasks of one job, as submitit starts them, work on its
run together, as processes of torchrun do; the first of them writes.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from align.config.compose import compose
from align.config.overrides import NAMES
from align.sweeps.record import bring_up_to_date, read_sweep
from data_prep.core.errors import TrainingStopped, UserError
from data_prep.core.files import write_json

IN_PROCESS = "BasicLauncher"
"""Hydra's launcher that runs one job after the other in this process; all others run them elsewhere."""
_SUBMITIT = "hydra_plugins.hydra_submitit_launcher."


def job(tree: Any) -> None:
    """What Hydra calls for each job. `tree` is Hydra's own composition and is not used: see `compose`."""
    settings = HydraConfig.get()
    folder, number = Path(settings.sweep.dir), int(settings.job.num)
    words = [typed_form(word) for word in settings.overrides.task]
    launcher = str(settings.launcher._target_)
    elsewhere = not launcher.endswith(IN_PROCESS)
    if launcher.startswith(_SUBMITIT):
        _join_tasks()
    print(f"job {number}: {_shown(folder, number, words)}", file=sys.stderr, flush=True)
    with _own_log(folder / "jobs" / f"{number}{_task()}.log", elsewhere):
        ended = run_job(number, words, folder)
    if elsewhere:
        said = ended.get("error", {}).get("message", "")
        print(f"job {number}: {ended['status']} {said}".rstrip(), file=sys.stderr, flush=True)


def _join_tasks() -> None:
    """Tell the tasks of this job, where there are several, of one another in the way of torchrun."""
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    if JobEnvironment().num_tasks > 1:
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)


def _task() -> str:
    """What the files of this task are told apart by: nothing for the one that writes."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f".{rank}"


def _shown(folder: Path, number: int, words: list[str]) -> str:
    """What is particular to this job; all of its overrides where that is not known."""
    row: dict[str, Any] = next((row for row in read_sweep(folder)["rows"] if row["job"] == number), {})
    varied = [f"{key}={value}" for key, value in row.get("varied", {}).items()]
    return " ".join(varied or words)


@contextmanager
def _own_log(path: Path, elsewhere: bool) -> Iterator[None]:
    """Jobs that run side by side write to a file each; one after the other they write to the screen."""
    if not elsewhere:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file, redirect_stderr(file):
        yield


def run_job(number: int, words: list[str], folder: Path) -> dict[str, Any]:
    """Run one job in `folder`/jobs/`number` and write `folder`/jobs/`number`.json, which is returned."""
    path = folder / "jobs" / f"{number}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    ended: dict[str, Any] = {"number": number, "overrides": words, "dir": f"jobs/{number}", "status": "running"}
    if not _task() and _ended(path) != ("done", words):
        write_json(path, ended)
        bring_up_to_date(folder)
    started = time.monotonic()
    try:
        ended.update(_run(number, words, folder))
    except (UserError, TrainingStopped) as problem:
        print(f"align: job {number}: {problem}", file=sys.stderr)
        ended.update(status="failed", exit_code=problem.exit_code, error=problem.as_dict())
    except Exception as problem:
        traceback.print_exc()
        message = f"{type(problem).__name__}: {problem}"
        ended.update(status="failed", exit_code=1, error=UserError(message, code="internal").as_dict())
    ended["seconds"] = round(time.monotonic() - started, 3)
    if not _task():
        write_json(path, ended)
        bring_up_to_date(folder)
    return ended


def _run(number: int, words: list[str], folder: Path) -> dict[str, Any]:
    """Compose the job's own overrides and run its pipeline."""
    from align import pipeline
    from align.runs.folder import SharedStages

    record = read_sweep(folder)
    planned = next((each["overrides"] for each in record["jobs"] if each["number"] == number), None)
    names = [each["stage"] for each in record["shared"] if number in each["used_by"]] if planned == words else []
    shared = SharedStages((folder / "shared").resolve(), frozenset(names))
    place = quoted(str(folder / "jobs"))
    group = f"tracking.group={quoted(folder.name)}"  # first, so that a group of the user's own wins
    done = pipeline.run(compose([group, *words, f"out={place}", f"name={number}"], record["config_dir"]), shared)
    import torch

    return {"status": done["status"], "exit_code": 0, "threads": torch.get_num_threads()}


def _ended(path: Path) -> tuple[str, list[str]] | None:
    """How the job ended before, and with what overrides."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record["status"], record["overrides"]
    except (OSError, ValueError, KeyError):
        return None


def typed_form(word: str) -> str:
    """A rewritten override as a person would type it."""
    for group, key in NAMES.items():
        word = word.replace(f".{group}.{key}=", f".{group}=")
    return word.removeprefix("++")


def quoted(path: str) -> str:
    """A path as a value that Hydra takes as it is."""
    return "'" + path.replace("'", "\\'") + "'"
