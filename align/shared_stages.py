"""Where the result of a stage belongs: in its run's folder, or, when jobs of a sweep have it in common, beside them.

    OUT/NAME/jobs/3/ppo/                 a stage of one job
    OUT/NAME/shared/sft-1a2b3c4d/        a stage of several jobs, trained by the first that needs it; the others wait

The eight digits are those of the digest of everything that decides the result, so equal inputs find one folder and
other inputs never meet in it. `shared/run.json` lists the stages as that of a run does. The lock is the kernel's: a
job that is killed lets it go, and what it had not published does not count.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.disk import write_json
from align.run_folder import earlier_entries, locked


@dataclass(frozen=True)
class SharedStages:
    """The folder `shared/` of a sweep as one of its jobs sees it."""

    folder: Path
    names: frozenset[str] = frozenset()
    """Stages of this job that another job needs as well."""


@dataclass(frozen=True)
class Home:
    """The place of one stage's result."""

    folder: Path
    name: str
    is_shared: bool = False

    @property
    def final(self) -> Path:
        """The folder of the finished stage."""
        return self.folder / self.name

    @property
    def staging(self) -> Path:
        """The folder of the stage at work."""
        return self.folder / f".staging-{self.name}"

    def seen_from(self, run: Path) -> str:
        """The finished stage's folder relative to a run's."""
        return os.path.relpath(self.final, run)

    @contextmanager
    def held(self) -> Iterator[None]:
        """No other job works on this stage inside; a run's own folder is locked as a whole already."""
        if not self.is_shared:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder, f".lock-{self.name}", waiting=f"another job trains {self.name}; waiting for it"):
            yield

    def keep(self, entry: dict[str, Any]) -> None:
        """List a published stage in `shared/run.json`; a run lists its own."""
        if not self.is_shared:
            return
        with locked(self.folder, waiting=""):
            kept = [old for old in earlier_entries(self.folder) if old["dir"] != self.name]
            entries = sorted([*kept, {**entry, "dir": self.name}], key=lambda each: str(each["dir"]))
            record = {"format_version": 1, "name": self.folder.name, "status": "done", "stages": entries}
            write_json(self.folder / "run.json", record)


def home_of(run: Path, stage: str, inputs_digest: str, shared: SharedStages | None) -> Home:
    """Where the result of a stage with these inputs belongs, or already is."""
    if shared is not None:
        home = Home(shared.folder, f"{stage}-{inputs_digest[:8]}", is_shared=True)
        if stage in shared.names or home.final.is_dir():
            return home
    return Home(run, stage)


def run_of(stage: Path) -> Path:
    """The run folder whose recipe made a stage: that around it, or for a shared stage the first job that has it."""
    stage = stage.resolve()
    for job in sorted(stage.parent.parent.glob("jobs/*/run.json")):
        if any((job.parent / entry["dir"]).resolve() == stage for entry in earlier_entries(job.parent)):
            return job.parent
    return stage.parent
