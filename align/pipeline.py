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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.blank import find_base, open_renderer
from align.chain import Footing, options_of
from align.checkpoint import Checkpoint
from align.config import RunConfig, StageSpec
from align.disk import publish, write_json
from align.dressing import bare
from align.fingerprint import base_fingerprint, file_sha256
from align.foreign import unknown_of
from align.preflight import require_grounds, stand
from align.quiet import quieten
from align.report import write_report
from align.run_folder import earlier_entries, finished, locked, make_folder, plain, yaml_text
from align.shared_stages import Home, SharedStages, home_of
from align.stages.base import TrainingStage
from align.tracks import Tracks
from data_prep.contents import data_digest, source_digest
from data_prep.digests import sha256_json, template_digest, tokenizer_digest
from data_prep.errors import TrainingStopped, UserError
from data_prep.reading import has_source

if TYPE_CHECKING:
    from accelerate import Accelerator

    from align.resume import Keeper

_CODE_VERSION = 2  # raised when a change makes equal inputs give another result
_NOT_INPUTS = {"init", "reward", "data", "adapter", "save_minutes"}
_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers write how many processes they have started."""


@dataclass
class Run:
    """One run folder while it is worked on."""

    config: RunConfig
    folder: Path
    base_folder: Path
    accelerator: Accelerator
    record: dict[str, Any]
    shared: SharedStages | None = None
    """What this run has in common with the other jobs of its sweep."""
    made: dict[str, Checkpoint] = field(default_factory=dict)
    """Checkpoints of this run by stage name, in order."""
    announced: bool = False
    """Whether the run has begun to do something."""
    tracks: Tracks = field(init=False)

    def __post_init__(self) -> None:
        self.tracks = Tracks(self.config, self.folder, self.record, self.accelerator.is_main_process)

    def announce(self) -> None:
        """Say once, before the first stage is trained or skipped, what this run is."""
        if not self.announced and self.accelerator.is_main_process:
            names = " -> ".join(spec.name for spec in self.config.stages)
            print(f"run {self.folder}: {names}", file=sys.stderr)
            self.tracks.start()
        self.announced = True

    def put(self, entry: dict[str, Any]) -> None:
        """Record a stage in place of what was recorded of it before, in the pipeline's order."""
        order = [spec.name for spec in self.config.stages]
        kept = [e for e in self.record["stages"] if e["name"] != entry["name"]]
        kept.append(entry)
        kept.sort(key=lambda e: order.index(e["name"]) if e["name"] in order else -1)
        self.record["stages"] = kept

    def write(self) -> None:
        """Bring run.json up to date."""
        if self.accelerator.is_main_process:
            write_json(self.folder / "run.json", self.record)


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
        record = _record(config, folder, str(process.device))
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
        state.put(_unfinished(spec, status, begun["dir"] if begun else f".staging-{spec.name}"))
    with suppress(Exception):
        state.write()
        _report(state)
        state.tracks.finish(status, interrupted=isinstance(error, KeyboardInterrupt))
        state.write()


def _unfinished(spec: StageSpec, status: str, staging: str) -> dict[str, Any]:
    """The entry of a stage that is at work or has failed: what there is of it lies in its staging folder."""
    return {"name": spec.name, "status": status, "dir": staging, "skipped": False, "metrics": {}}


def _stage(state: Run, spec: StageSpec) -> None:
    """One stage: resolve what it stands on, skip it when its result is there, else run and publish it."""
    ground = stand(state.config, spec, state.made, state.base_folder)
    ground.require()
    init, reward, standing = ground.init, ground.reward, ground.footing
    assert standing is not None
    if init is not None and init.foreign and state.accelerator.is_main_process:
        print(unknown_of(init.record, init.folder), file=sys.stderr)
    digest = _inputs_digest(state, spec, init, reward, standing)
    home = home_of(state.folder, spec.name, digest, state.shared)
    with home.held():
        state.accelerator.wait_for_everyone()  # one process holds the lock for all
        started = time.monotonic()
        entry = finished(home.folder, home.name, digest, earlier_entries(home.folder))
        state.announce()
        if entry is None:
            state.put(_unfinished(spec, "running", os.path.relpath(home.staging, state.folder)))
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


def _inputs_digest(
    state: Run, spec: StageSpec, init: Checkpoint | None, reward: Checkpoint | None, standing: Footing
) -> str:
    """Hash of everything that decides the stage's result."""
    options = {k: v for k, v in asdict(spec.stage).items() if k not in _NOT_INPUTS}
    if isinstance(spec.stage, TrainingStage):
        options["lr"] = spec.stage.peak_lr(spec.adapter, state.config.model.lr_scale)
    folder = state.base_folder
    reads = [*spec.stage.needs_data, *(kind for kind in spec.stage.may_read if has_source(spec.data, kind))]
    gold = spec.data.gold if "prompts" in spec.stage.needs_data and spec.data.gold.rule else None
    return sha256_json(
        {
            "code": _CODE_VERSION,
            "stage": spec.name,
            "options": plain(options),
            "adapter": options_of(spec.adapter),
            "data": {kind: data_digest(spec.data, kind) for kind in reads},
            "gold": [gold.rule, plain(gold.options), source_digest(spec.data, gold.source)] if gold else None,
            "base": [base_fingerprint(folder), tokenizer_digest(folder), template_digest(folder)],
            "parents": [c.digest if c else None for c in (init, reward)],
            "footing": [standing.mode.name if standing.mode else None, standing.load.value],
            "processes": state.accelerator.num_processes,
            "seed": state.config.seed,
        }
    )


def _train(
    state: Run,
    spec: StageSpec,
    inputs: tuple[Checkpoint | None, Checkpoint | None],
    standing: Any,
    digest: str,
    home: Home,
) -> dict[str, Any]:
    """Run a stage in its staging folder and publish the result."""
    from align.base import BaseIdentity
    from align.machine import peak_rss, reset_peak_rss
    from align.resume import FOLDER
    from align.roles import Bases
    from align.tracking import Metrics
    from align.work import Work

    config, process = state.config, state.accelerator
    staging = home.staging
    keeper = _keeper(state, spec, staging, digest)
    identity = BaseIdentity(
        _base_id(config, state.base_folder), config.model.revision, base_fingerprint(state.base_folder)
    )
    bases = Bases(state.base_folder, identity, process.device)
    metrics = Metrics(staging / "metrics.jsonl", spec.name, state.tracks.row)
    init, reward = inputs
    renderer = open_renderer(state.base_folder)
    work = Work(config, spec, process, bases, renderer, standing, init, reward, staging, metrics, digest, keeper)
    reset_peak_rss()
    (staging / "recipe.yaml").write_text(yaml_text(config.resolved["stages"][spec.name]), encoding="utf-8")
    saved = spec.stage.run(work)
    process.wait_for_everyone()  # every process has read the staging folder back before it is renamed
    final = home.final
    if process.is_main_process:
        if saved is None:
            write_json(staging / "inputs.json", {"inputs_digest": digest})
        shutil.rmtree(staging / FOLDER, ignore_errors=True)
        publish(staging, final)
    process.wait_for_everyone()
    own = file_sha256(final / ("checkpoint.json" if saved is not None else "result.json"))
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
        "trainable": work.numbers.get("trainable", 0),
        "total": work.numbers.get("total", 0),
        "tokens": work.numbers.get("tokens"),
        "metrics": work.numbers.get("metrics", {}),
        "phases": {name: round(seconds, 3) for name, seconds in work.phases.items()},
    }
    del work, bases
    gc.collect()
    return entry


def _keeper(state: Run, spec: StageSpec, staging: Path, digest: str) -> Keeper:
    """What keeps a stage's state, in a staging folder that holds no more than the state of an earlier run."""
    from align.resume import Keeper, prepare

    minutes = spec.stage.save_minutes if isinstance(spec.stage, TrainingStage) else 0.0
    is_main = bool(state.accelerator.is_main_process)
    if is_main and (step := prepare(staging, digest, minutes)):
        print(f"{spec.name}: goes on after step {step}, where it was stopped", file=sys.stderr)
    state.accelerator.wait_for_everyone()
    return Keeper(staging, digest, minutes, is_main)


def _record(config: RunConfig, folder: Path, device: str) -> dict[str, Any]:
    from align.machine import facts, versions

    return {
        "format_version": 1,
        "name": config.name,
        "status": "running",
        "pipeline": config.pipeline,
        "seed": config.seed,
        "command": config.command,
        "config_digest": config.digest,
        "versions": versions(),
        "machine": facts(device),
        "stages": earlier_entries(folder),
    }


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
