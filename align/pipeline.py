"""run(config): the stages in order, names resolved to checkpoints, finished stages skipped, everything recorded.

This is the one road from a configuration to a result; a single stage is a pipeline of one.
"""

from __future__ import annotations

import gc
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.chain import Footing, footing, options_of
from align.checkpoint import Checkpoint, model_folder, resolve_checkpoint
from align.config import RunConfig, StageSpec
from align.disk import clear_staging, publish, write_json
from align.fingerprint import base_fingerprint, file_sha256
from align.options import Load, OnPrecisionChange
from align.report import write_report
from align.run_folder import earlier_entries, finished, locked, make_folder, plain, yaml_text
from align.stages.base import TrainingStage
from align.tracks import Tracks
from data_prep.digests import sha256_json, template_digest, tokenizer_digest
from data_prep.errors import TrainingStopped, UserError
from data_prep.reading import data_digest, has_source, source_digest

if TYPE_CHECKING:
    from accelerate import Accelerator

_CODE_VERSION = 1  # raised when a change makes equal inputs give another result
_NOT_INPUTS = {"init", "reward", "data", "adapter"}


@dataclass
class Run:
    """One run folder while it is worked on."""

    config: RunConfig
    folder: Path
    base_folder: Path
    accelerator: Accelerator
    record: dict[str, Any]
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


def run(config: RunConfig) -> dict[str, Any]:
    """Run every stage of `config` that is not finished yet; returns the content of run.json.

    Raises:
        UserError: something does not fit; nothing already saved is touched.
        TrainingStopped: training stopped itself; finished stages stay.
    """
    _quiet_libraries()
    place = Path(config.out).expanduser().resolve() / config.name
    is_new = not place.exists()
    base_folder = None if config.model.init else _base_folder(config, place)
    folder = make_folder(config)
    with locked(folder):
        process = _accelerator()
        record = _record(config, folder, str(process.device))
        state = Run(config, folder, base_folder or _base_folder(config, folder), process, record)
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
    if not any(entry["name"] == spec.name and entry.get("digest") for entry in state.record["stages"]):
        state.put(_unfinished(spec, status))
    with suppress(Exception):
        state.write()
        _report(state)
        state.tracks.finish(status, interrupted=isinstance(error, KeyboardInterrupt))
        state.write()


def _unfinished(spec: StageSpec, status: str) -> dict[str, Any]:
    """The entry of a stage that is at work or has failed: what there is of it lies in its staging folder."""
    return {"name": spec.name, "status": status, "dir": f".staging-{spec.name}", "skipped": False, "metrics": {}}


def _stage(state: Run, spec: StageSpec) -> None:
    """One stage: resolve what it stands on, skip it when its result is there, else run and publish it."""
    stage, started = spec.stage, time.monotonic()
    init = _input(state, stage.init, "policy")
    reward = _input(state, stage.reward, "reward") if stage.needs_reward else None
    if stage.needs_reward and reward is None and not stage.reward_optional:
        raise UserError(
            f"{spec.name} needs a reward model",
            code="missing_reward",
            hint=f"set stages.{spec.name}.reward=RUN/reward_model, or use pipeline=rlhf",
        )
    for checkpoint in (init, reward):
        if checkpoint is not None:
            checkpoint.require(state.base_folder)
    standing = footing(init, spec.adapter, stage.on_parent, state.config.model.load, state.config.on_precision_change)
    _check_reward_load(state, spec, reward, standing.load)
    digest = _inputs_digest(state, spec, init, reward, standing)
    final = state.folder / spec.name
    entry = finished(state.folder, spec.name, digest, state.record["stages"])
    state.announce()
    if entry is None:
        state.put(_unfinished(spec, "running"))
        state.write()
        _report(state)
        entry = _train(state, spec, (init, reward), standing, digest)
        entry["seconds"] = round(time.monotonic() - started, 3)
    state.put(entry)
    state.tracks.stage_done(entry, final)
    state.write()
    if spec is not state.config.stages[-1]:
        _report(state)
    if (final / "checkpoint.json").is_file():
        state.made[spec.name] = Checkpoint.open(final)
    _say(state, entry)


def _input(state: Run, wanted: str | None, role: str) -> Checkpoint | None:
    """A named input (stage of this run, RUN/STAGE or path), or the run's latest checkpoint of that role."""
    if wanted == "base":
        return None
    if wanted is None:
        fitting = [c for c in state.made.values() if c.record["role"] == role]
        return fitting[-1] if fitting else None
    if wanted in state.made:
        return state.made[wanted]
    if any(spec.name == wanted for spec in state.config.stages) and not (state.folder / wanted).is_dir():
        raise UserError(f"stage '{wanted}' comes later in this pipeline than the stage that needs it")
    found = resolve_checkpoint(wanted, state.config.out)
    if found.record["role"] != role:
        raise UserError(
            f"'{wanted}' is a {found.record['role']} checkpoint where a {role} is needed",
            code="wrong_role",
            file=str(found.folder),
        )
    return found


def _check_reward_load(state: Run, spec: StageSpec, reward: Checkpoint | None, load: Load) -> None:
    if reward is None or spec.stage.reward_optional or reward.load == load.value:
        return
    if state.config.on_precision_change is OnPrecisionChange.refuse:
        raise UserError(
            f"the reward model was trained on a {reward.load} base, {spec.name} would load it as {load.value}, "
            "where it scores differently",
            code="precision_change",
            hint="train both at one precision, or set on_precision_change=recalibrate",
        )


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
    state: Run, spec: StageSpec, inputs: tuple[Checkpoint | None, Checkpoint | None], standing: Any, digest: str
) -> dict[str, Any]:
    """Run a stage in its staging folder and publish the result."""
    from align.base import BaseIdentity
    from align.machine import peak_rss, reset_peak_rss
    from align.roles import Bases
    from align.tracking import Metrics
    from align.work import Work

    config, process = state.config, state.accelerator
    staging = state.folder / f".staging-{spec.name}"
    if process.is_main_process:
        clear_staging(staging)
    process.wait_for_everyone()
    identity = BaseIdentity(
        _base_id(config, state.base_folder), config.model.revision, base_fingerprint(state.base_folder)
    )
    bases = Bases(state.base_folder, identity, process.device)
    metrics = Metrics(staging / "metrics.jsonl", spec.name, state.tracks.row)
    init, reward = inputs
    work = Work(
        config, spec, process, bases, _renderer(state.base_folder), standing, init, reward, staging, metrics, digest
    )
    reset_peak_rss()
    (staging / "recipe.yaml").write_text(yaml_text(config.resolved["stages"][spec.name]), encoding="utf-8")
    saved = spec.stage.run(work)
    process.wait_for_everyone()  # every process has read the staging folder back before it is renamed
    final = state.folder / spec.name
    if process.is_main_process:
        if saved is None:
            write_json(staging / "inputs.json", {"inputs_digest": digest})
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
        "metrics": work.numbers.get("metrics", {}),
        "phases": {name: round(seconds, 3) for name, seconds in work.phases.items()},
    }
    del work, bases
    gc.collect()
    return entry


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


def _base_folder(config: RunConfig, folder: Path) -> Path:
    if config.model.init == "random":
        from align.blank import make_blank

        return make_blank(config.model, config.stages[0].data, config.seed, folder / "blank")
    if config.model.init is not None:
        raise UserError(f"unknown init '{config.model.init}' (choices: random)", field="model.init")
    if not config.model.path:
        raise UserError("no model is given", field="model.path", hint="set model=hf model.path=FOLDER")
    return model_folder(config.model.path, config.model.revision)


def _base_id(config: RunConfig, folder: Path) -> str:
    path = config.model.path
    if config.model.init == "random":
        return f"random:{config.seed}"
    assert path is not None
    return str(folder) if Path(path).expanduser().exists() else path


def _accelerator() -> Accelerator:
    from accelerate import Accelerator

    return Accelerator()


def _renderer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    from data_prep.prepare import Renderer

    return Renderer(AutoTokenizer.from_pretrained(folder, local_files_only=True))


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


def _quiet_libraries() -> None:
    """Keep third-party start-up chatter off the screen."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("transformers", "peft", "accelerate", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
