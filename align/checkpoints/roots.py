"""Where the base of a chain lies, by the record of the checkpoint that stands on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.models.fingerprint import base_fingerprint
from align.models.location import model_folder
from data_prep.core.errors import UserError

FRESH = "random:"
"""How the root of a chain begins whose base was made in its run."""


def base_of(checkpoint: Path, record: dict[str, Any]) -> Path:
    """The folder of the base that a checkpoint's record names, one that was made in the run included.

    Raises:
        UserError: it is not there; `base=FOLDER` says where it is now.
    """
    root = str(record["root"])
    if root.startswith(FRESH):
        expected = None if record.get("derived_base") else record["base"]["fingerprint"]
        for folder in _fresh(checkpoint.resolve()):
            if expected in (None, base_fingerprint(folder)):
                return folder
        raise UserError(
            "the base was made from nothing in the run, and is not there",
            code="missing_model",
            file=str(checkpoint),
            hint="it lies in blank/ of the run folder: base=FOLDER",
        )
    try:
        return model_folder(root)
    except UserError as problem:
        raise UserError(
            f"the base that it was trained on is not found ({problem.message})",
            code=problem.code,
            file=str(checkpoint),
            hint="say where it is now: base=FOLDER",
        ) from None


def _fresh(checkpoint: Path) -> Iterator[Path]:
    """Bases that were made in the run of a checkpoint, or in a job of its sweep."""
    for above in checkpoint.parents[:4]:
        jobs = sorted(above.glob("*/blank")) if (above / "sweep.json").is_file() else []
        yield from (folder for folder in (above / "blank", *jobs) if (folder / "config.json").is_file())
