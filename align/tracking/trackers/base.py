"""The tracker protocol: what a run tells other programs while it works.

A tracker is a class in one file of this folder, registered with `@trackers.register("name")`. It lives in a process of
its own (`align/tracking/processes.py` starts it, `align/tracking/trackers/__main__.py` is its loop), so it may be
slow, raise or hang as it likes; training never waits for it. Importing a tracker must not import its package.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from align.config.registries import trackers
from data_prep.core.errors import UserError
from data_prep.core.files import json_lines


@dataclass(frozen=True)
class Facts:
    """What a tracker is told of a run when it starts; all of it is plain JSON."""

    name: str
    """What the run is called: the name of its folder, after the group's where it has a group."""
    id: str
    """Stays the same when the same command goes on with the same run folder."""
    folder: str
    """The run folder, absolute."""
    resumed: bool
    """Whether this tracker has seen the run before."""
    config: dict[str, Any]
    """The resolved recipe."""
    project: str
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: str | None = None
    """offline, online, or None: as the environment says, else offline."""
    weights: bool = True
    """Whether weight files go along with checkpoints."""

    @property
    def own_folder(self) -> Path:
        """Where a tracker without a place of its own keeps its files."""
        return Path(self.folder) / "tracking"


@dataclass(frozen=True)
class StageFacts:
    """What a tracker is told of a finished stage."""

    name: str
    folder: str
    """The stage's folder, absolute."""
    entry: dict[str, Any]
    """What run.json says of it."""

    @property
    def numbers(self) -> dict[str, float]:
        """Its final metrics, trainable parameters, seconds and memory, with the stage's name before each key."""
        flat = dict(_numbers(self.entry.get("metrics") or {}, f"{self.name}/final"))
        for key in ("seconds", "peak_rss_bytes", "peak_gpu_bytes", "trainable", "total"):
            flat.update(_numbers({key: self.entry.get(key)}, self.name))
        return flat

    def samples(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows of `samples.jsonl`; whatever is not text is shown as JSON."""
        path = Path(self.folder) / "samples.jsonl"
        if not path.is_file():
            return [], []
        rows = json_lines(path)
        columns = list(dict.fromkeys(key for row in rows for key in row))
        return columns, [[_shown(row.get(column)) for column in columns] for row in rows]


class Tracker:
    """One tracker of one run. Each call happens in order and in the tracker's own process; any of them may raise."""

    package: ClassVar[str]
    """The package it needs; its extra has the tracker's own name."""

    def start(self, run: Facts) -> dict[str, str | None]:
        """Begin; returns where the run can be seen: `url` or `dir`."""
        raise NotImplementedError

    def log(self, stage: str, step: int, split: str, values: dict[str, float]) -> None:
        """One row of metrics.jsonl: `step` optimiser steps done in `stage`, `split` train or eval."""
        raise NotImplementedError

    def stage_done(self, stage: StageFacts) -> None:
        """A stage has been saved."""

    def finish(self, status: str) -> None:
        """The run has ended: done, stopped or failed."""


def keyed(stage: str, split: str, values: dict[str, float]) -> dict[str, float]:
    """The keys of one row as every tracker shows them: `sft/train/loss`."""
    return {f"{stage}/{split}/{key}": value for key, value in values.items()}


def check_packages(names: Sequence[str]) -> None:
    """The packages of these trackers are installed.

    Raises:
        UserError: one is missing; what to install is said.
    """
    for name in names:
        package = trackers.get(name).package
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{name} needs the package '{package}', which is not installed",
                field="tracking.to",
                code="missing_package",
                hint=f"in the clone: pip install -e '.[{name}]'",
            )


def _numbers(values: dict[str, Any], prefix: str) -> list[tuple[str, float]]:
    """The numbers among `values`, nested ones with their path; lists and texts are left out."""
    found: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}/{key}")
        elif isinstance(value, int | float):
            found.append((f"{prefix}/{key}", float(value)))
    return found


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
