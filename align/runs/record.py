"""One run folder while it is worked on: what run.json says of it, and what decides that a stage is done already."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.checkpoints.checkpoint import RECORD, Checkpoint
from align.checkpoints.compatibility import StagePlan, adapter_name, options_of
from align.config.schema import RunConfig
from align.models.fingerprint import base_fingerprint
from align.report.page import reported
from align.run_record import RunRecord, StageEntry
from align.runs.environment import facts, versions
from align.runs.folder import SharedStages, StageFolder
from align.stages.base import TrainingStage
from align.tracking.processes import TrackerPool
from align.training.inputs import Inputs
from data_prep.core.errors import TrainingStopped, UserError
from data_prep.core.interrupts import interrupts
from data_prep.core.options import plain
from data_prep.prepare.content_digest import data_digest, source_digest
from data_prep.records.stream import Given, has_source
from data_prep.rendering.digests import template_digest, tokenizer_digest

if TYPE_CHECKING:
    from accelerate import Accelerator

_CODE_VERSION = 3  # raised when a change makes equal inputs give another result
_NOT_INPUTS = {"init", "reward", "data", "adapter", "save_minutes", "on_out_of_memory", "trunk_cache"}


@dataclass
class Run:
    """One run folder while it is worked on."""

    config: RunConfig
    folder: Path
    base_folder: Path
    accelerator: Accelerator
    is_new: bool = False
    """Whether the folder was made for this call."""
    shared: SharedStages | None = None
    """What this run has in common with the other jobs of its sweep."""
    made: dict[str, Checkpoint] = field(default_factory=dict)
    """Checkpoints of this run by stage name, in order."""
    announced: bool = False
    """Whether the run has begun to do something."""
    read_ahead: bool = False
    """Whether the rows of later stages have been looked at."""
    stage: str | None = None
    """The stage at work."""
    record: RunRecord = field(init=False)
    tracks: TrackerPool = field(init=False)

    def __post_init__(self) -> None:
        self.record = _new_record(self.config, self.folder, str(self.accelerator.device))
        self.tracks = TrackerPool(self.config, self.folder, self.record, self.is_main)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.accelerator.is_main_process)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Leave a run.json and a report that say how the run ended; one refused at once leaves no word of it."""
        try:
            yield
        except BaseException as error:
            if self.announced or not (self.is_new and isinstance(error, UserError)):
                self._failed(error)
            raise
        self.record.status = "done"
        self.write()
        self._report()
        self.tracks.finish("done")
        self.write()

    def _failed(self, error: BaseException) -> None:
        """Say what happened, and of which stage; nothing here may hide the error itself."""
        status = "stopped" if isinstance(error, TrainingStopped | KeyboardInterrupt) else "failed"
        self.record.status, self.record.failed_stage = status, self.stage
        self.record.error = str(error) or type(error).__name__
        begun = next((entry for entry in self.record.stages if entry.name == self.stage), None)
        if self.stage and (begun is None or not begun.digest):
            self._put(_unfinished(self.stage, status, begun.dir if begun else f".staging-{self.stage}"))
        with suppress(Exception):
            self.write()
            if interrupts.insisted:
                return
            self._report()
            self.tracks.finish(status, interrupted=isinstance(error, KeyboardInterrupt))
            self.write()

    def asked_to_end(self) -> bool:
        """Whether a signal has asked any of the processes to end the run, while a stage was at work."""
        if self.accelerator.num_processes == 1:
            return interrupts.wanted
        import torch

        asked = torch.tensor(float(interrupts.wanted), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, "sum"))

    def announce(self) -> None:
        """Say once, before the first stage is trained or skipped, what this run is."""
        if not self.announced and self.is_main:
            names = " -> ".join(spec.name for spec in self.config.stages)
            print(f"run {self.folder}: {names}", file=sys.stderr)
            self.tracks.start()
        self.announced = True

    def begin(self, home: StageFolder) -> None:
        """Record that the stage is at work."""
        assert self.stage is not None
        self._put(_unfinished(self.stage, "running", os.path.relpath(home.staging, self.folder)))
        self.write()
        self._report()

    def finish(self, home: StageFolder, entry: StageEntry) -> None:
        """Record the stage's result for people, trackers and the stages after it."""
        assert self.stage is not None
        entry = replace(entry, name=self.stage)
        self._put(replace(entry, dir=home.seen_from(self.folder)))
        self.tracks.stage_done(entry.as_dict(), home.final)
        self.write()
        if self.stage != self.config.stages[-1].name:
            self._report()
        if (home.final / RECORD).is_file():
            self.made[self.stage] = Checkpoint.open(home.final)
        if self.is_main:
            print(_line(entry), file=sys.stderr)

    def _put(self, entry: StageEntry) -> None:
        self.record.put(entry, [spec.name for spec in self.config.stages])

    def write(self) -> None:
        """Bring run.json up to date."""
        if self.is_main:
            self.record.write()

    def _report(self) -> None:
        """Bring report.html and the run's warnings up to date; what is trained stays, whatever goes wrong here."""
        if self.is_main:
            try:
                _, self.record.warnings = reported(self.folder)
            except Exception as problem:
                print(f"report.html was not written ({type(problem).__name__}: {problem})", file=sys.stderr)


def _unfinished(stage: str, status: str, staging: str) -> StageEntry:
    """The entry of a stage that is at work or has failed: what there is of it lies in its staging folder."""
    return StageEntry(stage, status, staging, skipped=False, metrics={})


def _line(entry: StageEntry) -> str:
    """What stderr says of a stage that is done."""
    digest = (entry.digest or "")[:8]
    if entry.skipped:
        return f"{entry.name}: finished before, skipped ({digest})"
    numbers = {k: v for k, v in (entry.metrics or {}).items() if isinstance(v, int | float)}
    shown = " ".join(f"{k}={v:.4g}" for k, v in list(numbers.items())[:6])
    return f"{entry.name}: done in {entry.seconds or 0:.0f} s ({digest}) {shown}"


def done_entry(plan: StagePlan[Checkpoint], digest: str, numbers: dict[str, Any]) -> StageEntry:
    """The entry of a stage that has been trained.

    Args:
        digest: of its result.
        numbers: what was measured of it.
    """
    mode, parents = plan.require(), (("init", plan.init), *(("reward", judge) for judge in plan.judges))
    return StageEntry(
        name=plan.spec.name,
        status="done",
        dir=plan.spec.name,
        digest=digest,
        parents=[{"role": role, "digest": one.digest} for role, one in parents if one],
        adapter=adapter_name(plan.spec.adapter),
        on_parent=mode.mode.name if mode.mode else None,
        load=mode.load.value,
        skipped=False,
        **numbers,
    )


def inputs_of(run: Run, plan: StagePlan[Checkpoint]) -> Inputs:
    """Everything that decides the stage's result."""
    spec, mode = plan.spec, plan.require()
    options = {k: v for k, v in plain(spec.stage).items() if k not in _NOT_INPUTS | spec.stage.idle}
    signals = spec.stage.reward if not isinstance(spec.stage.reward, str | None) else None
    if signals:  # more than a parent
        options["reward"] = plain(signals)
    if isinstance(spec.stage, TrainingStage):
        from align.training.optimizer import is_narrow

        options["autocast"] = "bf16" if is_narrow(spec.stage, run.accelerator.device) else "off"
        options["lr"] = spec.stage.peak_lr(spec.adapter, run.config.model.lr_scale)
    folder = run.base_folder
    reads = [*spec.stage.reads, *(kind for kind in spec.stage.may_read if has_source(spec.data, kind))]
    gold = spec.data.gold if "prompts" in spec.stage.reads and (spec.data.gold.has_judge or signals) else None
    judged = [hash for each in spec.stage.judged_by(spec.data) for hash in each.source.contents(spec.data)]
    beside = spec.stage.reads_beside()
    rows_of_gold = source_digest(Given(spec.data, gold.source), None) if gold else None
    return Inputs(
        {
            "code": _CODE_VERSION,
            "stage": spec.name,
            "options": options,
            "adapter": options_of(spec.adapter),
            "data": {kind: data_digest(spec.data, kind) for kind in reads},
            "gold": [gold.rule, plain(gold.options), rows_of_gold] if gold else None,
            "base": [base_fingerprint(folder), tokenizer_digest(folder), template_digest(folder)],
            "parents": [c.digest if c else None for c in (plan.init, plan.reward, *plan.ensemble)],
            "footing": [mode.mode.name if mode.mode else None, mode.load.value],
            "processes": run.accelerator.num_processes,
            "seed": run.config.seed,
            **({"gold_signal": plain(gold.signal)} if gold and gold.signal else {}),
            **({"judged_by": judged} if judged else {}),
            **({"beside": beside} if beside else {}),
            **({"plain": True} if run.config.model.plain else {}),
            **({"deterministic": True} if run.config.deterministic else {}),
            **({"trunk_cache": False} if getattr(spec.stage, "trunk_cache", None) == 0 else {}),
            **({"revision": spec.stage.revision} if spec.stage.revision else {}),
        }
    )


def _new_record(config: RunConfig, folder: Path, device: str) -> RunRecord:
    """run.json as a run begins; entries of stages that were finished before are taken over."""
    return RunRecord(
        folder=folder,
        name=config.name,
        pipeline=config.pipeline,
        seed=config.seed,
        command=config.command,
        config_digest=config.digest,
        versions=versions(),
        machine=facts(device),
        stages=RunRecord.left_in(folder).finished(),
    )
