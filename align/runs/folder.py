"""The run folder: making and locking it, and what an earlier run left in it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from align.checkpoints.checkpoint import Checkpoint
from align.config.schema import RunConfig
from align.run_record import FILE, RunRecord, StageEntry
from data_prep.core.errors import UserError
from data_prep.core.files import write_text
from data_prep.core.hashing import file_sha256


def place_of(config: RunConfig) -> Path:
    """Where the folder of a run is, or would be."""
    return Path(config.out).expanduser().resolve() / config.name


def make_folder(config: RunConfig) -> Path:
    """The run's folder with the resolved recipe in it."""
    folder = place_of(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "recipe.yaml", yaml_text(config.resolved))
    except OSError as error:
        raise UserError(
            f"cannot write the run folder ({error.strerror or error})",
            code="cannot_write",
            file=str(folder),
            hint="choose another place with out=FOLDER",
        ) from None
    return folder


@contextmanager
def gone_if_refused(folder: Path) -> Iterator[None]:
    """Remove a new run folder, which is locked, where the run is refused before a stage is done or has counted."""
    try:
        yield
    except UserError:
        run = RunRecord.left_in(folder)
        if not any(entry.digest or (run.at(entry) / "metrics.jsonl").is_file() for entry in run.stages):
            shutil.rmtree(folder)
        raise


@contextmanager
def locked(folder: Path, name: str = ".lock", waiting: str | None = None) -> Iterator[None]:
    """One process (or group of processes) works on a run folder at a time.

    Args:
        name: the file that is locked.
        waiting: say this and wait for the other process, instead of refusing.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        yield
        return
    with (folder / name).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if waiting is None:
                raise UserError("another process is working on this run", code="locked", file=str(folder)) from None
            if waiting:
                print(waiting, file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def yaml_text(value: Any) -> str:
    """A value as YAML, keys in their order."""
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


@dataclass(frozen=True)
class SharedStages:
    """The folder `shared/` of a sweep as one of its jobs sees it."""

    folder: Path
    names: frozenset[str] = frozenset()
    """Stages of this job that another job needs as well."""


@dataclass(frozen=True)
class StageFolder:
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

    def keep(self, entry: StageEntry) -> None:
        """List a published stage in `shared/run.json`; a run lists its own."""
        if not self.is_shared:
            return
        with locked(self.folder, waiting=""):
            kept = [old for old in RunRecord.left_in(self.folder).finished() if old.dir != self.name]
            entries = sorted([*kept, replace(entry, dir=self.name)], key=lambda each: each.dir)
            RunRecord(self.folder, self.folder.name, "done", stages=entries).write()


def home_of(run: Path, stage: str, inputs_digest: str, shared: SharedStages | None) -> StageFolder:
    """Where the result of a stage with these inputs belongs, or already is."""
    if shared is not None:
        home = StageFolder(shared.folder, f"{stage}-{inputs_digest[:8]}", is_shared=True)
        if stage in shared.names or home.final.is_dir():
            return home
    return StageFolder(run, stage)


def run_of(stage: Path) -> Path:
    """The run folder whose recipe made a stage: that around it, or for a shared stage the first job that has it."""
    stage = stage.resolve()
    for path in sorted(stage.parent.parent.glob(f"jobs/*/{FILE}")):
        job = RunRecord.left_in(path.parent)
        if any(job.at(entry).resolve() == stage for entry in job.finished()):
            return job.folder
    return stage.parent


def finished(home: StageFolder, inputs_digest: str) -> StageEntry | None:
    """The entry of a stage that is done with equal inputs, else None.

    Raises:
        UserError: the stage's files are not those it was saved with.
    """
    final, name = home.final, home.name
    if (final / "checkpoint.json").is_file():
        checkpoint = Checkpoint.open(final)
        checkpoint.check_files()
        known, own = checkpoint.record["inputs_digest"], checkpoint.digest
        metrics = checkpoint.record.get("metrics", {})
    elif (final / "result.json").is_file() and (final / "inputs.json").is_file():
        known = json.loads((final / "inputs.json").read_text(encoding="utf-8"))["inputs_digest"]
        own, metrics = file_sha256(final / "result.json"), {}
    else:
        return None
    if known != inputs_digest:
        return None
    recorded = (e for e in RunRecord.left_in(home.folder).finished() if (e.dir, e.digest) == (name, own))
    entry = next(recorded, StageEntry(name, dir=name, digest=own, metrics=metrics))
    return replace(entry, status="done", skipped=True)
