"""The on-disk contract between stages: what a checkpoint folder holds, and how it is checked before anything loads.

`checkpoint.json` says what the checkpoint stands on (base, parents, tokenizer, template, precision) and what every file
hashes to. Its own SHA-256 is the checkpoint's digest, and children record it, so a chain is a chain of hashes: any
edit anywhere below is seen. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.fingerprint import base_fingerprint, file_sha256
from data_prep.errors import UserError, nearest

FORMAT_VERSION = 1
RECORD = "checkpoint.json"
EMBEDDED = Path(__file__).parent / "models"


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

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the record of `folder`; files and parents are not checked yet (`verify`, `require`)."""
        path = folder / RECORD
        if not path.is_file():
            raise UserError(f"not a checkpoint: {RECORD} is missing", file=str(folder), hint=_nearby(folder))
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise UserError(f"not valid JSON ({error})", file=str(path)) from None
        if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
            found = record.get("format_version") if isinstance(record, dict) else type(record).__name__
            raise UserError("unknown checkpoint format", file=str(path), hint=f"got {found}; expected {FORMAT_VERSION}")
        return cls(folder, record, file_sha256(path))

    @property
    def stage(self) -> str:
        return str(self.record["stage"])

    @property
    def method(self) -> str:
        return str(self.record["method"])

    @property
    def load(self) -> str:
        return str(self.record["load"])

    @property
    def on_parent(self) -> str | None:
        return self.record.get("on_parent")

    @property
    def label(self) -> str:
        """Stage and first digits of the digest, for messages."""
        return f"{self.stage} {self.digest[:8]}"

    def parents(self) -> list[Parent]:
        return [Parent(p["role"], p["path"], p["digest"]) for p in self.record["parents"]]

    def parent(self, role: str = "init") -> Checkpoint | None:
        """The checkpoint this one stands on (`init`), or the one it was trained against under `role`."""
        for entry in self.parents():
            if entry.role == role:
                folder = self._parent_folder(entry)
                if not (folder / RECORD).is_file():
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
        return None

    def _parent_folder(self, entry: Parent) -> Path:
        return Path(os.path.normpath(self.folder / entry.path))

    def check_files(self) -> None:
        """Every file the record names exists and has the bytes it was saved with."""
        if self.record.get("head") and "head.safetensors" not in self.record["files"]:
            raise UserError("record has a head but no head file", file=str(self.folder / RECORD))
        for name, expected in self.record["files"].items():
            path = self.folder / name
            if not path.is_file():
                raise UserError(f"file of {self.label} is missing", code="missing_file", file=str(path))
            if file_sha256(path) != expected:
                raise UserError(
                    f"content changed since {self.label} was saved",
                    code="changed_file",
                    file=str(path),
                    hint="restore the file or train the stage again",
                )

    def ancestors(self) -> list[Checkpoint]:
        """Every checkpoint below this one, nearest first; each once."""
        found: dict[str, Checkpoint] = {}
        for entry in self.parents():
            parent = self.parent(entry.role)
            assert parent is not None
            for checkpoint in (parent, *parent.ancestors()):
                found.setdefault(checkpoint.digest, checkpoint)
        return list(found.values())

    def require(self, base_folder: Path) -> None:
        """Refuse, with one line, whatever does not fit: files, parents, base, tokenizer, template.

        Args:
            base_folder: the model folder this chain is to stand on. Weights are hashed, never loaded.
        """
        for checkpoint in (self, *self.ancestors()):
            checkpoint.check_files()
            checkpoint._check_base(base_folder)

    def _check_base(self, base_folder: Path) -> None:
        from data_prep.digests import template_digest, tokenizer_digest

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

    def base_folder(self) -> Path:
        """The folder of the root base this chain stands on, as recorded."""
        init = next((p for p in self.parents() if p.role == "init"), None)
        if init is not None:
            parent = self.parent("init")
            assert parent is not None
            return parent.base_folder()
        return model_folder(str(self.record["root"]))

    def verify(self, base_folder: Path | None = None) -> list[dict[str, Any]]:
        """All checks by name, each with ok and detail; nothing is raised."""
        checks: list[dict[str, Any]] = []

        def check(name: str, action: Any) -> None:
            try:
                checks.append({"name": name, "ok": True, "detail": str(action() or "")})
            except UserError as error:
                checks.append({"name": name, "ok": False, "detail": str(error)})

        chain = [self]
        check("parents", lambda: chain.extend(self.ancestors()))
        for checkpoint in chain:
            check(f"files of {checkpoint.label}", checkpoint.check_files)
        check("base", lambda: str(base_folder or self.base_folder()))
        if checks[-1]["ok"]:
            folder = base_folder or self.base_folder()
            for checkpoint in chain:
                check(f"base of {checkpoint.label}", lambda c=checkpoint: c._check_base(folder))
        return checks


def model_folder(path: str) -> Path:
    """The folder of a base: a path, `package:nano`, or a hub id that is (or can be) downloaded."""
    if path.startswith("package:"):
        folder = EMBEDDED / path.removeprefix("package:")
        if not folder.is_dir():
            names = sorted(p.name for p in EMBEDDED.iterdir()) if EMBEDDED.is_dir() else []
            raise UserError(f"no embedded model '{folder.name}'", hint=f"there is: {', '.join(names) or 'none'}")
        return folder
    folder = Path(path).expanduser()
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        if not folder.is_dir():
            found = nearest(folder.name, [p.name for p in folder.parent.iterdir()]) if folder.parent.is_dir() else None
            hint = f"did you mean {folder.parent / found}?" if found else None
            raise UserError(f"model folder does not exist: {path}", code="missing_model", hint=hint)
        return folder.resolve()
    return _from_hub(path)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(
            f"'{name}' is no folder here, and the hub cannot be reached or has no such model ({reason})",
            code="hub_unreachable",
            hint="give the path of a downloaded model folder: model.path=PATH",
        ) from None


def resolve_target(target: str, out: str) -> Path:
    """The checkpoint or run folder that TARGET names: a path, RUN, or RUN/STAGE below `out`."""
    for candidate in (Path(target).expanduser(), Path(out) / target):
        if (candidate / RECORD).is_file() or (candidate / "run.json").is_file():
            return candidate
        stage = _stage_folder(candidate.parent, candidate.name)
        if stage is not None:
            return stage
    raise UserError(
        f"no run or checkpoint '{target}' (looked for ./{target} and {Path(out) / target})",
        code="unknown_target",
        hint=_nearby(Path(out) / target),
    )


def resolve_checkpoint(target: str, out: str) -> Checkpoint:
    """TARGET as a checkpoint; a run stands for its last stage that has weights."""
    folder = resolve_target(target, out)
    if (folder / RECORD).is_file():
        return Checkpoint.open(folder)
    entries = [e for e in read_run(folder)["stages"] if e.get("digest") and (folder / e["dir"] / RECORD).is_file()]
    made = [Checkpoint.open(folder / entry["dir"]) for entry in entries]
    speaking = [checkpoint for checkpoint in made if checkpoint.record["role"] == "policy"] or made
    if not speaking:
        raise UserError("this run has no finished stage with weights yet", file=str(folder))
    return speaking[-1]


def read_run(folder: Path) -> dict[str, Any]:
    """The content of a run folder's run.json."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"run.json cannot be read ({error})", file=str(folder)) from None
    return dict(record)


def _stage_folder(run: Path, stage: str) -> Path | None:
    if not (run / "run.json").is_file():
        return None
    for entry in read_run(run)["stages"]:
        if entry["name"] == stage and (run / entry["dir"]).is_dir():
            return run / str(entry["dir"])
    return None


def _nearby(folder: Path) -> str | None:
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


def write_json(path: Path, value: Any) -> None:
    """Write JSON through a temporary file and a rename, so that a reader sees the old file or the new one."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staging.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        sync(staging)
        os.replace(staging, path)
    except OSError as error:
        raise UserError(f"cannot write ({error.strerror or error})", code="cannot_write", file=str(path)) from None


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(staging: Path, final: Path) -> None:
    """Move a complete staging folder to its name in one rename; a folder already there is kept under `.archive/`."""
    if final.exists():
        archive = final.parent / ".archive"
        archive.mkdir(exist_ok=True)
        number = 1 + sum(1 for p in archive.iterdir() if p.name.startswith(final.name + "-"))
        os.replace(final, archive / f"{final.name}-{number}")
    os.replace(staging, final)
    sync(final.parent)


def clear_staging(staging: Path) -> Path:
    """An empty staging folder; what an interrupted run left there was never published."""
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    return staging
