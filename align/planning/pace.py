"""Minutes of a stage, from runs of the same stage, method, base and device in the folder of runs; else unknown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.checkpoints.compatibility import adapter_name
from align.config.schema import RunConfig
from align.run_record import FILE, RunRecord, StageEntry
from data_prep.core.errors import UserError
from data_prep.core.options import build

if TYPE_CHECKING:
    from align.checkpoints.compatibility import StagePlan
    from align.planning.devices import Device

WIDER = 1.25
"""How far another run may be from what earlier ones say, both ways."""


@dataclass(frozen=True)
class Minutes:
    """How long a stage may take."""

    low: float
    high: float
    runs: int
    """Earlier runs that say so."""

    def as_dict(self) -> dict[str, Any]:
        """As `align plan --json` prints it."""
        return {"low": round(self.low, 4), "high": round(self.high, 4), "runs": self.runs}


def minutes_of(config: RunConfig, plan: StagePlan[Any], rows: int, tokens: float, device: Device) -> Minutes | None:
    """The minutes of a stage over so many training rows of so many tokens in the mean; None where no run tells."""
    work = plan.spec.stage.work(rows, tokens)
    found = [work * seconds / 60 for seconds in _seconds(config, plan, device)]
    if not found:
        return None
    return Minutes(min(found) / WIDER, max(found) * WIDER, len(found))


def _seconds(config: RunConfig, plan: StagePlan[Any], device: Device) -> list[float]:
    """Seconds for a unit of the stage's work in earlier runs of its kind."""
    found = []
    for file in sorted(Path(config.out).expanduser().glob(f"*/{FILE}")):
        run = RunRecord.left_in(file.parent)
        if not device.did(run.machine or {}):
            continue
        for entry in run.finished("recipe.yaml"):
            work = _work(config, plan, run, entry)
            if work and entry.seconds:
                found.append(entry.seconds / work)
    return found


def _work(config: RunConfig, plan: StagePlan[Any], run: RunRecord, entry: StageEntry) -> float | None:
    """The work of a finished stage, if it is one of the planned kind on the same base."""
    from align.report.run_files import read_json, read_recipe

    spec, folder = plan.spec, run.at(entry)
    if (
        entry.name != spec.name
        or entry.adapter != adapter_name(spec.adapter)
        or entry.load != plan.require().load.value
    ):
        return None
    try:
        recipe = read_recipe(run.folder / "recipe.yaml", [])
        own = read_recipe(folder / "recipe.yaml", [])
        if recipe["model"]["path"] != config.model.path:
            return None
        names = {key: own[key] for key in own if key not in ("adapter", "data", "stage")}
        stage: Any = build(type(spec.stage), names, "")
        card = read_json(folder / "data_card.json", [])
        work: float = stage.work(card["splits"]["train"], card["tokens"]["mean"])
    except (OSError, KeyError, TypeError, UserError):
        return None
    return work
