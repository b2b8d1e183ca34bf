"""Content fingerprints: what a checkpoint stands on, in one hash, without loading a weight into a model.

A base's fingerprint covers the architecture and every tensor's name, type, shape and bytes. It does not depend on how
the tensors are spread over files. Hashes of large files are remembered by path, size and time of change.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from data_prep.digests import sha256_json
from data_prep.errors import UserError, nearest

# Keys of config.json that do not change what the weights compute.
_VOLATILE = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "architectures",
    "_from_model_config",
}
_BLOCK = 1 << 22


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex, read now."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; pickled weights are refused."""
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickled:
        raise UserError(
            f"only pickled weights here ({pickled[0].name}), which can run code when loaded",
            file=str(folder),
            hint="convert them once with transformers: save_pretrained(folder, safe_serialization=True)",
        )
    raise UserError("no *.safetensors weights in this folder", file=str(folder))


def read_model_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; one line says what is missing."""
    path = folder / "config.json"
    if not folder.is_dir():
        parent = folder.parent
        found = nearest(folder.name, [p.name for p in parent.iterdir()]) if parent.is_dir() else None
        raise UserError(
            f"model folder does not exist: {folder}", hint=f"did you mean {parent / found}?" if found else None
        )
    if not path.is_file():
        raise UserError("not a model folder: config.json is missing", file=str(folder))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"not valid JSON ({error})", file=str(path)) from None
    if not isinstance(config, dict):
        raise UserError("expected a JSON object", file=str(path))
    return config


def base_fingerprint(folder: Path) -> str:
    """SHA-256 over architecture and tensors of a model folder, in hex; remembered while its files do not change."""
    config = read_model_config(folder)
    files = weight_files(folder)
    key = sha256_json([config] + [_stamp(path) for path in files])
    cache = _Cache()
    known = cache.get(key)
    if known is None:
        tensors: dict[str, list[Any]] = {}
        for path in files:
            tensors.update(_tensor_hashes(path))
        kept = {name: value for name, value in config.items() if name not in _VOLATILE}
        known = sha256_json([kept, tensors])
        cache.put(key, known)
    return known


def _stamp(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino]


def _tensor_hashes(path: Path) -> dict[str, list[Any]]:
    """Name -> [dtype, shape, sha256 of the bytes], read straight from the safetensors layout."""
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size <= 0 or size > path.stat().st_size:
            raise UserError("not a safetensors file (damaged header)", file=str(path))
        try:
            header = json.loads(stream.read(size))
        except (ValueError, UnicodeDecodeError):
            raise UserError("not a safetensors file (damaged header)", file=str(path)) from None
        start = 8 + size
        result = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            stream.seek(start + first)
            result[name] = [entry["dtype"], entry["shape"], _hash_bytes(stream, last - first)]
    return result


def _hash_bytes(stream: Any, count: int) -> str:
    digest = hashlib.sha256()
    while count > 0:
        block = stream.read(min(_BLOCK, count))
        if not block:
            raise UserError("safetensors file is shorter than its header says", file=str(stream.name))
        digest.update(block)
        count -= len(block)
    return digest.hexdigest()


class _Cache:
    """Fingerprints by stamp in one small JSON file; losing it only costs time."""

    def __init__(self) -> None:
        root = os.environ.get("ALIGN_CACHE") or os.path.join(
            os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "align"
        )
        self._path = Path(root) / "fingerprints.json"

    def get(self, key: str) -> str | None:
        found = self._read().get(key)
        return found if isinstance(found, str) else None

    def put(self, key: str, value: str) -> None:
        known = self._read()
        known[key] = value
        staging = self._path.with_suffix(f".{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            staging.write_text(json.dumps(known), encoding="utf-8")
            os.replace(staging, self._path)
        except OSError:
            return  # an unwritable cache folder: hash again next time

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}
