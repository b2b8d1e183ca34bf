"""run.json: what a run folder says of its run and of every stage. One type, one reader, one writer; no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from data_prep.core.errors import UserError
from data_prep.core.files import write_json

FILE = "run.json"
FORMAT_VERSION = 1
ANEW = "the command that made the run takes its finished stages as they are, and writes it anew"
"""What helps where it is lost."""
_AWAY = f"move it away: {ANEW}"


@dataclass
class StageEntry:
    """What a run says of one stage. Only `name` and `dir` are known of every one."""

    name: str
    status: str | None = None
    """running, done, failed or stopped."""
    dir: str = ""
    """Its folder, relative to the run's; its staging folder while it is not done."""
    digest: str | None = None
    """SHA-256 of its checkpoint.json, or result.json; None while it is not done."""
    parents: list[dict[str, str]] | None = None
    """role and digest of each."""
    adapter: str | None = None
    on_parent: str | None = None
    load: str | None = None
    skipped: bool | None = None
    """Whether it was found done when the run came to it."""
    peak_rss_bytes: int | None = None
    peak_gpu_bytes: int | None = None
    """Most that tensors took on a CUDA device; None elsewhere."""
    trainable: int | None = None
    total: int | None = None
    tokens: int | None = None
    metrics: dict[str, Any] | None = None
    phases: dict[str, float] | None = None
    """Seconds by phase."""
    seconds: float | None = None
    more: dict[str, Any] = field(default_factory=dict)
    """Keys that other versions wrote; they stay."""

    def __post_init__(self) -> None:
        self.dir = self.dir or self.name

    @classmethod
    def of(cls, value: dict[str, Any]) -> StageEntry:
        """An entry as it stands in the file."""
        known, more = _apart(cls, value)
        return cls(**{**known, "name": str(value["name"]), "dir": str(value.get("dir") or "")}, more=more)

    def as_dict(self) -> dict[str, Any]:
        """As it stands in the file: every key of a stage that was trained, of another what is known."""
        return _together(self, leave_out=self.parents is None)


@dataclass
class RunRecord:
    """What a run folder says of its run."""

    folder: Path
    name: str = ""
    status: str = "running"
    """running, done, failed or stopped."""
    pipeline: str | None = None
    seed: int | None = None
    command: list[str] | None = None
    config_digest: str | None = None
    versions: dict[str, str] | None = None
    machine: dict[str, str | int] | None = None
    warnings: list[dict[str, Any]] = field(default_factory=list)
    """What deserves a second look: code, message, hint and stage of each."""
    stages: list[StageEntry] = field(default_factory=list)
    """In the order of the pipeline."""
    error: str | None = None
    failed_stage: str | None = None
    tracking: list[dict[str, Any]] | None = None
    """What became of every tracker."""
    more: dict[str, Any] = field(default_factory=dict)
    """Keys that other versions wrote; they stay."""

    @classmethod
    def open(cls, folder: Path) -> RunRecord:
        """The record of a run folder.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        try:
            value = json.loads((folder / FILE).read_text(encoding="utf-8"))
            known, more = _apart(cls, value)
            entries = [entry for entry in value["stages"] if isinstance(entry, dict) and entry.get("name")]
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{FILE} cannot be read ({error})", file=str(folder), hint=_AWAY) from None
        except (KeyError, TypeError):
            raise UserError(f"{FILE} cannot be read (it lists no stages)", file=str(folder), hint=_AWAY) from None
        more.pop("format_version", None)
        return cls(**{**known, "folder": folder, "stages": [StageEntry.of(entry) for entry in entries]}, more=more)

    @classmethod
    def left_in(cls, folder: Path) -> RunRecord:
        """The record of a run folder; an empty one where there is none or it is torn: files say what is done."""
        try:
            return cls.open(folder)
        except UserError:
            return cls(folder)

    def at(self, entry: StageEntry) -> Path:
        """The folder of a stage."""
        return self.folder / entry.dir

    def finished(self, file: str = "") -> list[StageEntry]:
        """Entries of stages that are done and still there.

        Args:
            file: only those whose folder holds it.
        """
        return [entry for entry in self.stages if entry.digest and (self.at(entry) / file).exists()]

    def put(self, entry: StageEntry, order: list[str]) -> None:
        """Record a stage in place of what was recorded of it before, in the order of the pipeline's names."""
        kept = [*(old for old in self.stages if old.name != entry.name), entry]
        self.stages = sorted(kept, key=lambda each: order.index(each.name) if each.name in order else -1)

    def as_dict(self) -> dict[str, Any]:
        """The content of run.json."""
        found = _together(self, leave_out=True)
        del found["folder"]
        return {"format_version": FORMAT_VERSION, **found, "stages": [entry.as_dict() for entry in self.stages]}

    def write(self) -> None:
        """Bring run.json up to date; a reader sees the old one or the new one."""
        write_json(self.folder / FILE, self.as_dict())


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return (folder / FILE).is_file()


def _apart(cls: type, value: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of a JSON object that a record has fields for, and the others."""
    names = {each.name for each in fields(cls)} - {"more", "folder"}
    return {k: v for k, v in value.items() if k in names}, {k: v for k, v in value.items() if k not in names}


def _together(record: StageEntry | RunRecord, leave_out: bool) -> dict[str, Any]:
    """A record's fields by name and its other keys; `leave_out` those that are None."""
    found = {each.name: getattr(record, each.name) for each in fields(record) if each.name != "more"}
    return {**{k: v for k, v in found.items() if not leave_out or v is not None}, **record.more}
