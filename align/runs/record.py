"""Record."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.checkpoints.checkpoint import Checkpoint
from align.checkpoints.compatibility import ParentMode, options_of
from align.config.schema import RunConfig, StageSpec
from align.models.fingerprint import base_fingerprint
from align.runs.folder import SharedStages, earlier_entries, plain
from align.stages.base import TrainingStage
from align.tracking.processes import TrackerPool
from data_prep.core.files import write_json
from data_prep.core.hashing import sha256_json
from data_prep.prepare.content_digest import data_digest, source_digest
from data_prep.records.stream import has_source
from data_prep.rendering.digests import template_digest, tokenizer_digest

if TYPE_CHECKING:
    from accelerate import Accelerator

_CODE_VERSION = 3  # raised when a change makes equal inputs give another result
_NOT_INPUTS = {"init", "reward", "data", "adapter", "save_minutes"}


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
    tracks: TrackerPool = field(init=False)

    def __post_init__(self) -> None:
        self.tracks = TrackerPool(self.config, self.folder, self.record, self.accelerator.is_main_process)

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


def unfinished_entry(spec: StageSpec, status: str, staging: str) -> dict[str, Any]:
    """The entry of a stage that is at work or has failed: what there is of it lies in its staging folder."""
    return {"name": spec.name, "status": status, "dir": staging, "skipped": False, "metrics": {}}


def inputs_digest_of(
    state: Run, spec: StageSpec, init: Checkpoint | None, reward: Checkpoint | None, standing: ParentMode
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
            **({"plain": True} if state.config.model.plain else {}),
        }
    )


def new_record(config: RunConfig, folder: Path, device: str) -> dict[str, Any]:
    """The content of run.json as a run begins; entries of stages that were finished before are taken over."""
    from align.runs.environment import facts, versions

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
