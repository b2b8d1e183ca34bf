"""The run folder: making and locking it, and what an earlier run left in it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from align.checkpoint import Checkpoint
from align.config import RunConfig
from align.fingerprint import file_sha256
from data_prep.errors import UserError

_PREVIOUS = ".run.previous.json"


def make_folder(config: RunConfig) -> Path:
    """The run's folder with the resolved recipe in it; an earlier run.json is kept aside."""
    folder = Path(config.out).expanduser().resolve() / config.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        recipe = folder / f".recipe.{os.getpid()}"
        recipe.write_text(yaml_text(config.resolved), encoding="utf-8")
        os.replace(recipe, folder / "recipe.yaml")
        if (folder / "run.json").is_file():
            shutil.copyfile(folder / "run.json", folder / _PREVIOUS)
    except OSError as error:
        raise UserError(
            f"cannot write the run folder ({error.strerror or error})",
            code="cannot_write",
            file=str(folder),
            hint="choose another place with out=FOLDER",
        ) from None
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process (or group of processes) works on a run folder at a time."""
    if int(os.environ.get("RANK", "0")) > 0:
        yield
        return
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError("another process is working on this run", code="locked", file=str(folder)) from None
        yield


def finished(folder: Path, name: str, inputs_digest: str) -> dict[str, Any] | None:
    """The entry of a stage that is done with equal inputs, else None.

    Raises:
        UserError: the stage's files are not those it was saved with.
    """
    final = folder / name
    if (final / "checkpoint.json").is_file():
        checkpoint = Checkpoint.open(final)
        checkpoint.check_files()
        known, own = checkpoint.record["inputs_digest"], checkpoint.digest
    elif (final / "result.json").is_file() and (final / "inputs.json").is_file():
        known = json.loads((final / "inputs.json").read_text(encoding="utf-8"))["inputs_digest"]
        own = file_sha256(final / "result.json")
    else:
        return None
    if known != inputs_digest:
        return None
    entries = [e for e in _earlier_entries(folder) if e.get("name") == name and e.get("digest") == own]
    entry = entries[-1] if entries else {"name": name, "dir": name, "digest": own, "metrics": {}}
    return {**entry, "status": "done", "skipped": True}


def _earlier_entries(folder: Path) -> list[dict[str, Any]]:
    path = folder / _PREVIOUS
    if not path.is_file():
        return []
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["stages"])
    except (ValueError, KeyError, TypeError):
        return []  # a torn record: the stage's own files say that it is done


def yaml_text(value: Any) -> str:
    """A value as YAML, keys in their order."""
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


def plain(value: Any) -> Any:
    """Options as JSON values; enums by name."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value.name if isinstance(value, Enum) else value
