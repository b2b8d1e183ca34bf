"""The on-disk contract between stages: what a checkpoint folder holds, and how it is checked before anything loads.

`checkpoint.json` says what the checkpoint stands on (base, parents, tokenizer, template, precision) and what every file
hashes to. Its own SHA-256 is the checkpoint's digest, and children record it, so a chain is a chain of hashes: any
edit anywhere below is seen. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from align.checkpoints.peft_adapter import fitted, foreign_record, is_foreign, require_named_base
from align.checkpoints.roots import base_of
from align.models.chat_template import TEMPLATE, dressed
from align.models.fingerprint import base_fingerprint, read_model_config
from align.models.location import model_folder
from align.run_record import RunRecord, is_run
from data_prep.core.errors import UserError, nearest
from data_prep.core.files import sync, write_json
from data_prep.core.hashing import file_sha256, sha256_json
from data_prep.rendering.digests import template_digest, tokenizer_digest
from data_prep.types import with_features

FORMAT_VERSION = 1
RECORD = "checkpoint.json"
_RESTORE = "restore the file, or move the stage's folder away: the same command trains it again"


@dataclass(frozen=True)
class Parent:
    """One checkpoint that another stands on or was trained against."""

    role: str
    path: str
    digest: str

    def as_dict(self) -> dict[str, str]:
        return {"role": self.role, "path": self.path, "digest": self.digest}


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint folder and its record."""

    folder: Path
    record: dict[str, Any] = field(repr=False)
    digest: str
    below: dict[str, Checkpoint] = field(default_factory=dict, repr=False, compare=False)
    """Checkpoints of its chain by digest, as they were when first looked at from here: each is opened once."""

    @classmethod
    def open(cls, folder: Path | str) -> Checkpoint:
        """Read the record of `folder`; files and parents are not checked yet (`verify`, `require`).

            checkpoint = align.Checkpoint.open("runs/my-run/ppo")

        A plain peft adapter gets the record that its own files give (`align/checkpoints/peft_adapter.py`).
        """
        folder = Path(folder)
        if is_foreign(folder):
            record = foreign_record(folder)
            return cls(folder, record, sha256_json(record))
        path = folder / RECORD
        if not path.is_file():
            raise UserError(f"not a checkpoint: {RECORD} is missing", file=str(folder), hint=nearby_runs(folder))
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise UserError(f"not valid JSON ({error})", file=str(path)) from None
        _require_keys(path, record)
        if record["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"unknown format_version (got {record['format_version']}; expected {FORMAT_VERSION})",
                file=str(path),
                hint="read it with the version of align that wrote it",
            )
        return cls(folder, record, file_sha256(path))

    @property
    def stage(self) -> str:
        return str(self.record["stage"])

    @property
    def method(self) -> str:
        return str(self.record["method"])

    @property
    def role(self) -> str:
        return str(self.record["role"])

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.record["options"])

    @property
    def probe_ids(self) -> list[list[int]]:
        """The rows whose outputs the record keeps, with their features where they have any."""
        probe = self.record.get("probe") or {}
        rows = probe.get("input_ids") or []
        given = probe.get("features") or [None] * len(rows)
        told = (tuple(one) if isinstance(one, list) else one for one in given)
        return [with_features(ids, one) for ids, one in zip(rows, told, strict=True)]

    @property
    def load(self) -> str:
        return str(self.record["load"])

    @property
    def foreign(self) -> bool:
        """Whether it is a plain peft adapter, made elsewhere."""
        return bool(self.record.get("foreign"))

    @property
    def on_parent(self) -> str | None:
        return self.record.get("on_parent")

    @property
    def label(self) -> str:
        """Stage and first digits of the digest, for messages."""
        return f"{self.stage} {self.digest[:8]}"

    def parents(self) -> list[Parent]:
        return [Parent(p["role"], p["path"], p["digest"]) for p in self.record["parents"]]

    @property
    def judges(self) -> list[dict[str, str]]:
        """Stock models that rewarded it, which are no checkpoints: name, path and fingerprint."""
        return list(self.record.get("judges") or [])

    def parent(self, role: str = "init") -> Checkpoint | None:
        """The checkpoint this one stands on (`init`), or the first that it was trained against under `role`."""
        entry = next((each for each in self.parents() if each.role == role), None)
        return None if entry is None else self._parent(entry)

    def _parent(self, entry: Parent) -> Checkpoint:
        if entry.digest not in self.below:
            self.below[entry.digest] = replace(self._open_parent(entry), below=self.below)
        return self.below[entry.digest]

    def _open_parent(self, entry: Parent) -> Checkpoint:
        """A parent where it was, or where its run has moved it to.

        Raises:
            UserError: it is missing, or another checkpoint lies there.
        """
        folder = Path(os.path.normpath(self.folder / entry.path))
        here = (folder / RECORD).is_file()
        if not is_foreign(folder) and (not here or file_sha256(folder / RECORD) != entry.digest):
            folder = self._moved(entry.digest) or folder
        if not (folder / RECORD).is_file() and not is_foreign(folder):
            raise UserError(
                f"parent of {self.label} is missing: {entry.role} {entry.digest[:8]} at {entry.path}",
                code="missing_parent",
                file=str(self.folder / RECORD),
            )
        found = Checkpoint.open(folder)
        if found.digest != entry.digest:
            raise UserError(
                f"parent of {self.label} is another checkpoint than it was trained from "
                f"(got {found.digest[:8]}; expected {entry.digest[:8]})",
                code="wrong_parent",
                file=str(folder),
            )
        return found

    def _moved(self, digest: str) -> Path | None:
        """Where this run keeps the checkpoint of a digest, its archive of replaced stages included."""
        run = next(filter(is_run, self.folder.resolve().parents), None)
        places = [*sorted(run.glob(f"*/{RECORD}")), *sorted(run.glob(f".archive/*/{RECORD}"))] if run else []
        return next((path.parent for path in places if file_sha256(path) == digest), None)

    def check_files(self) -> None:
        """The record is the one its run knows, and every file it names exists with the bytes it was saved with."""
        self._check_record()
        if self.record.get("head") and "head.safetensors" not in self.record["files"]:
            raise UserError("record has a head but no head file", file=str(self.folder / RECORD))
        for name, expected in self.record["files"].items():
            path = self.folder / name
            if not path.is_file():
                raise UserError(f"file of {self.label} is missing", code="missing_file", file=str(path), hint=_RESTORE)
            if file_sha256(path) != expected:
                raise UserError(
                    f"content changed since {self.label} was saved",
                    code="changed_file",
                    file=str(path),
                    hint=_RESTORE,
                )

    def _check_record(self) -> None:
        """The run folder, if there is one, knows this record's digest: an edited record is seen there."""
        run = self.folder.resolve().parent
        if not is_run(run):
            return
        for entry in RunRecord.open(run).stages:
            if entry.digest and entry.dir == self.folder.name and entry.digest != self.digest:
                raise UserError(
                    f"content changed since {self.stage} {entry.digest[:8]} was saved",
                    code="changed_file",
                    file=str(self.folder / RECORD),
                    hint=_RESTORE,
                )

    def nested(self) -> list[Checkpoint]:
        """Checkpoints kept inside this one's folder: PPO's critic."""
        return [Checkpoint.open(path.parent) for path in sorted(self.folder.glob(f"*/{RECORD}"))]

    def ancestors(self) -> list[Checkpoint]:
        """Every checkpoint below this one, nearest first; each once."""
        found: dict[str, Checkpoint] = {}
        for entry in self.parents():
            parent = self._parent(entry)
            for checkpoint in (parent, *parent.ancestors()):
                found.setdefault(checkpoint.digest, checkpoint)
        return list(found.values())

    def require(self, base_folder: Path, names: Collection[str] = ()) -> Checkpoint:
        """Refuse, with one line, whatever does not fit: files, parents, base, tokenizer, template.

        Args:
            base_folder: the model folder this chain is to stand on. Weights are hashed, never loaded.
            names: what the model is called; a plain peft adapter must name one of them as its base.

        Returns:
            The checkpoint itself, a plain peft adapter with its options as this base's stages would give them.
        """
        for checkpoint in (self, *self.ancestors()):
            checkpoint.check_files()
            checkpoint._check_base(base_folder)
        if not self.foreign:
            return self
        require_named_base(self.record, self.folder, base_folder, names)
        return replace(self, record=fitted(self.record, self.folder, read_model_config(base_folder)))

    def _check_base(self, base_folder: Path) -> None:
        if self.foreign:
            return  # its files say nothing of this
        if not self.record.get("derived_base"):
            expected = self.record["base"]["fingerprint"]
            if base_fingerprint(base_folder) != expected:
                raise UserError(
                    f"{self.label} was trained on another base ({self.record['base']['id']}, "
                    f"{expected[:8]}; got {base_folder.name}, {base_fingerprint(base_folder)[:8]})",
                    code="wrong_base",
                    file=str(base_folder),
                )
        for what, found, key in (
            ("tokenizer", tokenizer_digest(base_folder), "tokenizer_digest"),
            ("chat template", template_digest(base_folder), "template_digest"),
        ):
            if found != self.record[key]:
                raise UserError(
                    f"{self.label} was trained with another {what} (got {found[:8]}; expected {self.record[key][:8]})",
                    code=f"wrong_{key.removesuffix('_digest')}",
                    file=str(base_folder),
                )

    def base_folder(self, now: str | None = None) -> Path:
        """The folder of the root base this chain stands on: as recorded, or where `now` says that it lies today.

        Raises:
            UserError: it is not there. Whether it is the right one is for `require` to say.
        """
        parent = self.parent("init")
        if parent is not None and not parent.foreign:
            return parent.base_folder(now)
        folder = model_folder(now) if now else base_of(self.folder, self.record)
        template = self.folder / TEMPLATE
        return dressed(folder, template.read_text(encoding="utf-8")) if template.is_file() else folder

    def verify(self, base: str | None = None) -> list[dict[str, Any]]:
        """All checks by name, each with ok and a detail: what was found right, or what is wrong. Nothing is raised.

        Every parent is opened and every file is hashed anew, whatever has been looked at before.

        Args:
            base: where the base lies now, if it has moved.
        """
        checks: list[dict[str, Any]] = []
        self.below.clear()
        chain = [self]

        def check(name: str, action: Callable[[], Any], detail: str = "") -> None:
            try:
                checks.append({"name": name, "ok": True, "detail": str(action() or detail)})
            except UserError as error:
                checks.append({"name": name, "ok": False, "detail": str(error)})

        def joined(more: list[Checkpoint]) -> str:
            chain.extend(more)
            return ", ".join(checkpoint.label for checkpoint in more)

        check("parents", lambda: joined(self.ancestors()) or "none: it stands on the base")
        if any(self.folder.glob(f"*/{RECORD}")):
            check("kept inside it", lambda: joined(self.nested()))
        for one in chain:
            check(f"files of {one.label}", one.check_files, f"{len(one.record['files'])} files as they were saved")
        check("base", lambda: self.base_folder(base))
        if checks[-1]["ok"]:
            folder = self.base_folder(base)
            for one in chain:
                detail = "not known: made elsewhere" if one.foreign else "weights, tokenizer and chat template fit"
                check(f"base of {one.label}", partial(one._check_base, folder), detail)
        return checks


def _require_keys(path: Path, record: Any) -> None:
    """A record has every key that readers rely on, of the right type."""
    expected = {
        "format_version": int,
        "stage": str,
        "method": str,
        "options": dict,
        "role": str,
        "base": dict,
        "load": str,
        "parents": list,
        "files": dict,
        "tokenizer_digest": str,
        "template_digest": str,
        "inputs_digest": str,
    }
    if not isinstance(record, dict):
        raise UserError("expected a JSON object", code="damaged_record", file=str(path))
    for key, kind in expected.items():
        if not isinstance(record.get(key), kind):
            got = type(record[key]).__name__ if key in record else "nothing"
            raise UserError(
                f"damaged record (got {got}; expected {kind.__name__})",
                code="damaged_record",
                file=str(path),
                field=key,
            )


def nearby_runs(folder: Path) -> str | None:
    """A hint that names the folder most like one that does not exist."""
    if not folder.parent.is_dir():
        return None
    found = nearest(folder.name, [p.name for p in folder.parent.iterdir() if p.is_dir()])
    return f"did you mean {folder.parent / found}?" if found and found != folder.name else None


def write_record(folder: Path, record: dict[str, Any], names: list[str]) -> None:
    """Hash the named files of a staging folder into the record and write it last; everything reaches the disk."""
    record = {**record, "files": {name: file_sha256(folder / name) for name in sorted(names)}}
    write_json(folder / RECORD, record)
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)
    sync(folder)
