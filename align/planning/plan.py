"""`align plan`: peak memory and minutes of every stage, and what to change where a device has too little memory.

No weight is loaded: every stage is rehearsed (`align/planning/memory/bases.py`) on rows that are read as the run
would read them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.checkpoints.compatibility import StagePlan, adapter_name
from align.config.schema import Load, RunConfig, StageSpec
from align.models.fingerprint import read_model_config
from align.models.resolve import find_base, open_renderer
from align.planning.devices import Device
from align.planning.findings import Findings
from align.planning.pace import Minutes, minutes_of
from align.planning.preflight import require_plans
from align.planning.rows import Shelf
from align.training.data import reading_of
from data_prep.core.errors import UserError, said_by
from data_prep.prepare.arrow_rows import lengths_of

if TYPE_CHECKING:
    from align.planning.memory.parts import StageMemory


@dataclass(frozen=True)
class StageNeeds:
    """What a stage needs, and what would make it need less."""

    memory: StageMemory
    minutes: Minutes | None
    changes: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The stage in the answer of `align plan --json`."""
        memory = self.memory
        return {
            "peak_bytes": memory.peak_bytes,
            "low": memory.low,
            "high": memory.high,
            "minutes": self.minutes.as_dict() if self.minutes else None,
            "parts": memory.parts,
            "phases": memory.phases,
            "changes": self.changes,
        }


def plan(
    config: RunConfig, device: Device, say: Callable[[str], None] = lambda doing: None, shelf: Shelf | None = None
) -> Iterator[tuple[str, StageNeeds]]:
    """(stage, what it needs) in the order of the pipeline.

    Args:
        say: is told what is being done, for a progress line.
        shelf: holds rows that were read before.

    Raises:
        UserError: `align run` would refuse the run; `align check` lists everything.
    """
    shelf = shelf or Shelf(Findings())
    with tempfile.TemporaryDirectory(prefix="align-plan-") as scratch:
        folder = find_base(config, Path(scratch), weights=False)
        renderer, model_config = open_renderer(folder), read_model_config(folder)
        for each in require_plans(config, None if config.model.init else folder):
            spec = each.spec
            say(f"reading the rows of {spec.name}")
            reading = reading_of(each, model_config, renderer, config.seed)
            prepared = {kind: shelf.rows(reading, kind) for kind in spec.stage.reads}
            say(f"planning {spec.name}")
            yield spec.name, _needs(Rehearsed(config, each, folder, model_config, prepared), device)


@dataclass(frozen=True)
class Rehearsed:
    """One stage with all that its memory depends on."""

    config: RunConfig
    plan: StagePlan[Any]
    folder: Path
    model_config: dict[str, Any]
    prepared: dict[str, Any]

    def memory(self, device: Device) -> StageMemory:
        """What the stage takes on a device.

        Raises:
            UserError: its method does something on the way that needs numbers.
        """
        from align.planning.memory.bases import META, RehearsedBases, context_for
        from align.planning.memory.parts import memory_of

        spec = self.plan.spec
        bases = RehearsedBases(self.folder, self.model_config, device.kind, self.config.model.plain)
        context = context_for(self.config, self.plan, bases, self.prepared)
        try:
            with META:
                rehearsal = spec.stage.rehearse(context)
            return memory_of(rehearsal, bases.opened(), spec.stage, self.model_config, device)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            reason = said_by(error)
            raise UserError(
                f"the memory of {adapter_name(spec.adapter)} cannot be planned ({type(error).__name__}: {reason})",
                field=f"stages.{spec.name}",
                code="not_planned",
            ) from error

    def with_stage(self, stage: Any) -> Rehearsed:
        """The same with other options of the stage."""
        return replace(self, plan=replace(self.plan, spec=replace(self.plan.spec, stage=stage)))

    def with_load(self, load: Load) -> Rehearsed:
        """The same on weights of another precision."""
        return replace(self, plan=replace(self.plan, parent_mode=replace(self.plan.require(), load=load)))


def _needs(stage: Rehearsed, device: Device) -> StageNeeds:
    """Memory, minutes, and changes where it does not fit."""
    memory = stage.memory(device)
    lengths = lengths_of(next(iter(stage.prepared.values())).train)
    minutes = minutes_of(stage.config, stage.plan, len(lengths), float(np.mean(lengths)), device)
    changes = [] if memory.high <= device.bytes else list(_changes(stage, device))
    return StageNeeds(memory, minutes, changes)


def _changes(stage: Rehearsed, device: Device) -> Iterator[dict[str, Any]]:
    """Overrides that make the stage smaller, each with what it then takes; then all of those that cost no row."""
    spec: StageSpec = stage.plan.spec
    for override, changed in _lighter(stage, spec):
        memory = changed.memory(device)
        yield {
            "set": override,
            "peak_bytes": memory.peak_bytes,
            "high": memory.high,
            "fits": memory.high <= device.bytes,
        }


def _lighter(stage: Rehearsed, spec: StageSpec) -> Iterator[tuple[str, Rehearsed]]:
    where = f"stages.{spec.name}"
    for override, options in spec.stage.lighter(where):
        if not list(options.refusals(where, spec.adapter, stage.plan.reward)):
            yield override, stage.with_stage(options)
    load, traits = stage.plan.require().load, spec.adapter.traits
    for lower, allowed in ((Load.bf16, traits.bf16), (Load.nf4, traits.four_bit)):
        if allowed and not load.four_bit and load is not lower:
            yield f"model.load={lower.value}", stage.with_load(lower)
