"""run(config): the stages in order, names resolved to checkpoints, finished stages skipped, everything recorded.

This is the one road from a configuration to a result; a single stage is a pipeline of one.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.checkpoints.checkpoint import Checkpoint
from align.checkpoints.compatibility import options_of
from align.checkpoints.peft_adapter import unknown_of
from align.config.schema import RunConfig, StageSpec
from align.models.chat_template import bare
from align.models.fingerprint import base_fingerprint
from align.models.resolve import find_base, open_renderer
from align.planning.preflight import require_grounds, stand
from align.report.page import write_report
from align.runs.environment import quieten
from align.runs.folder import (
    SharedStages,
    StageFolder,
    earlier_entries,
    finished,
    home_of,
    locked,
    make_folder,
    yaml_text,
)
from align.runs.record import Run, inputs_digest_of, new_record, unfinished_entry
from align.stages.base import TrainingStage
from data_prep.core.errors import TrainingStopped, UserError
from data_prep.core.files import publish, write_json
from data_prep.core.hashing import file_sha256

if TYPE_CHECKING:
    from accelerate import Accelerator

    from align.training.resume import StateSaver

_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers write how many processes they have started."""


def run(config: RunConfig, shared: SharedStages | None = None) -> dict[str, Any]:
    """Run every stage of `config` that is not finished yet; returns the content of run.json.

    Args:
        shared: for a job of a sweep, which waits where another process is at work instead of refusing.

    Raises:
        UserError: something does not fit; nothing already saved is touched.
        TrainingStopped: training stopped itself; finished stages stay.
    """
    quieten()
    place = Path(config.out).expanduser().resolve() / config.name
    is_new = not place.exists()
    base_folder = None if config.model.init else find_base(config, place)
    require_grounds(config, base_folder)
    process = _accelerator()  # several processes wait for one another here, before any of them writes
    folder = make_folder(config)
    with locked(folder, waiting=f"another process works on {folder}; waiting for it" if shared else None):
        record = new_record(config, folder, str(process.device))
        with process.main_process_first():  # a fresh base is written by one of them
            base_folder = base_folder or find_base(config, folder)
        state = Run(config, folder, base_folder, process, record, shared)
        try:
            for spec in config.stages:
                _stage(state, spec)
            state.record["status"] = "done"
        except BaseException as error:
            if is_new and isinstance(error, UserError) and not state.announced and state.accelerator.is_main_process:
                shutil.rmtree(folder)  # refused before anything was done: leave no trace
            else:
                _record_failure(state, spec, error)
            raise
        state.write()
        _report(state)
        state.tracks.finish("done")
        state.write()
    return state.record


def _report(state: Run) -> None:
    """Bring report.html up to date; what is trained stays, whatever goes wrong here."""
    if state.accelerator.is_main_process:
        try:
            write_report(state.folder)
        except Exception as problem:
            print(f"report.html was not written ({type(problem).__name__}: {problem})", file=sys.stderr)


def _record_failure(state: Run, spec: StageSpec, error: BaseException) -> None:
    """Leave a run.json and a report that say what happened; nothing here may hide the error itself."""
    status = "stopped" if isinstance(error, TrainingStopped | KeyboardInterrupt) else "failed"
    state.record.update(status=status, error=str(error) or type(error).__name__, failed_stage=spec.name)
    begun = next((entry for entry in state.record["stages"] if entry["name"] == spec.name), None)
    if begun is None or not begun.get("digest"):
        state.put(unfinished_entry(spec, status, begun["dir"] if begun else f".staging-{spec.name}"))
    with suppress(Exception):
        state.write()
        _report(state)
        state.tracks.finish(status, interrupted=isinstance(error, KeyboardInterrupt))
        state.write()


def _stage(state: Run, spec: StageSpec) -> None:
    """One stage: resolve what it stands on, skip it when its result is there, else run and publish it."""
    ground = stand(state.config, spec, state.made, state.base_folder)
    ground.require()
    init, reward, standing = ground.init, ground.reward, ground.parent_mode
    assert standing is not None
    if init is not None and init.foreign and state.accelerator.is_main_process:
        print(unknown_of(init.record, init.folder), file=sys.stderr)
    digest = inputs_digest_of(state, spec, init, reward, standing)
    home = home_of(state.folder, spec.name, digest, state.shared)
    with home.held():
        state.accelerator.wait_for_everyone()  # one process holds the lock for all
        started = time.monotonic()
        entry = finished(home.folder, home.name, digest, earlier_entries(home.folder))
        state.announce()
        if entry is None:
            state.put(unfinished_entry(spec, "running", os.path.relpath(home.staging, state.folder)))
            state.write()
            _report(state)
            entry = _train(state, spec, (init, reward), standing, digest, home)
            entry["seconds"] = round(time.monotonic() - started, 3)
            if state.accelerator.is_main_process:
                home.keep(entry)
    state.put({**entry, "name": spec.name, "dir": home.seen_from(state.folder)})
    state.tracks.stage_done({**entry, "name": spec.name}, home.final)
    state.write()
    if spec is not state.config.stages[-1]:
        _report(state)
    if (home.final / "checkpoint.json").is_file():
        state.made[spec.name] = Checkpoint.open(home.final)
    _say(state, {**entry, "name": spec.name})


def _train(
    state: Run,
    spec: StageSpec,
    inputs: tuple[Checkpoint | None, Checkpoint | None],
    standing: Any,
    digest: str,
    home: StageFolder,
) -> dict[str, Any]:
    """Run a stage in its staging folder and publish the result."""
    from align.models.shared_base import BaseIdentity
    from align.roles import Bases
    from align.runs.environment import peak_rss, reset_peak_rss
    from align.tracking.metrics import Metrics
    from align.training.context import StageContext
    from align.training.resume import FOLDER

    config, process = state.config, state.accelerator
    staging = home.staging
    saver = _keeper(state, spec, staging, digest)
    identity = BaseIdentity(
        _base_id(config, state.base_folder), config.model.revision, base_fingerprint(state.base_folder)
    )
    bases = Bases(state.base_folder, identity, process.device, config.model.plain)
    metrics = Metrics(staging / "metrics.jsonl", spec.name, state.tracks.row)
    init, reward = inputs
    renderer = open_renderer(state.base_folder)
    context = StageContext(
        config, spec, process, bases, renderer, standing, init, reward, staging, metrics, digest, saver
    )
    reset_peak_rss()
    (staging / "recipe.yaml").write_text(yaml_text(config.resolved["stages"][spec.name]), encoding="utf-8")
    saved = spec.stage.run(context)
    process.wait_for_everyone()  # every process has read the staging folder back before it is renamed
    if process.is_main_process:
        if saved is None:
            write_json(staging / "inputs.json", {"inputs_digest": digest})
        shutil.rmtree(staging / FOLDER, ignore_errors=True)
        publish(staging, home.final)
    process.wait_for_everyone()
    own = file_sha256(home.final / ("checkpoint.json" if saved is not None else "result.json"))
    entry = {
        "name": spec.name,
        "status": "done",
        "dir": spec.name,
        "digest": own,
        "parents": [{"role": r, "digest": c.digest} for r, c in (("init", init), ("reward", reward)) if c],
        "adapter": options_of(spec.adapter)["method"],
        "on_parent": standing.mode.name if standing.mode else None,
        "load": standing.load.value,
        "skipped": False,
        "peak_rss_bytes": peak_rss(),
        "trainable": context.numbers.get("trainable", 0),
        "total": context.numbers.get("total", 0),
        "tokens": context.numbers.get("tokens"),
        "metrics": context.numbers.get("metrics", {}),
        "phases": {name: round(seconds, 3) for name, seconds in context.phases.items()},
    }
    del context, bases
    gc.collect()
    return entry


def _keeper(state: Run, spec: StageSpec, staging: Path, digest: str) -> StateSaver:
    """What keeps a stage's state, in a staging folder that holds no more than the state of an earlier run."""
    from align.training.resume import StateSaver, prepare

    minutes = spec.stage.save_minutes if isinstance(spec.stage, TrainingStage) else 0.0
    is_main = bool(state.accelerator.is_main_process)
    if is_main and (step := prepare(staging, digest, minutes)):
        print(f"{spec.name}: goes on after step {step}, where it was stopped", file=sys.stderr)
    state.accelerator.wait_for_everyone()
    return StateSaver(staging, digest, minutes, is_main)


def _base_id(config: RunConfig, folder: Path) -> str:
    path = config.model.path
    if config.model.init == "random":
        return f"random:{config.seed}"
    assert path is not None
    return str(bare(folder)) if Path(path).expanduser().exists() else path


def _accelerator() -> Accelerator:
    """This process among those that work on the run together.

    Raises:
        UserError: the environment tells of several processes, but they would not work together.
    """
    launched = next((int(found) for name in _SIZES if (found := os.environ.get(name, "")).isdecimal()), 1)
    together = all(os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))
    if launched > 1 and not together:
        raise _apart(launched, 1)
    from accelerate import Accelerator
    from torch import accelerator as device

    kind = device.current_accelerator() if device.is_available() else None
    # Without a device that has a backend of its own, accelerate joins processes only where it is told to use the CPU.
    process = Accelerator(cpu=launched > 1 and (kind is None or kind.type == "mps"))
    if process.num_processes != launched:
        raise _apart(launched, process.num_processes)
    return process


def _apart(launched: int, joined: int) -> UserError:
    return UserError(
        f"{launched} processes were launched, but {joined} would work on the run",
        code="processes",
        field="WORLD_SIZE",
        hint="launch them with torchrun or accelerate launch, or unset WORLD_SIZE to use one process",
    )


def _say(state: Run, entry: dict[str, Any]) -> None:
    """One line per stage on stderr."""
    if state.accelerator.is_main_process:
        if entry["skipped"]:
            text = f"{entry['name']}: finished before, skipped ({entry['digest'][:8]})"
        else:
            numbers = {k: v for k, v in entry["metrics"].items() if isinstance(v, int | float)}
            shown = " ".join(f"{k}={v:.4g}" for k, v in list(numbers.items())[:6])
            text = f"{entry['name']}: done in {entry['seconds']:.0f} s ({entry['digest'][:8]}) {shown}"
        print(text, file=sys.stderr)
