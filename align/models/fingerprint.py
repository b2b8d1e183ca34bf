"""Content fingerprints: what a checkpoint stands on, in one hash, without loading a weight into a model.

A base's fingerprint covers the architecture and every tensor's name, type, shape and bytes. It does not depend on how
the tensors are spread over files. Hashes of large files are remembered by path, size and time of change.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from data_prep.core.cache_folder import Remembered
from data_prep.core.errors import UserError, nearest
from data_prep.core.hashing import _BLOCK, sha256_json

_SINGLE = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
"""Where peft says what an adapter is; beside a whole model transformers puts that adapter on top of it, unasked."""

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


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a model folder, as its index names them; pickled weights are refused."""
    files = sorted(folder.glob("*.safetensors"))
    if lost := [path for path in files if not path.is_file()]:
        raise UserError(
            "is no file" if lost[0].exists() else "is a link that leads nowhere",
            code="wrong_weights",
            file=str(lost[0]),
            hint="get the folder again: its weights are gone",
        )
    index = folder / "model.safetensors.index.json"
    if files and index.is_file():
        weight_map = _read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError("has no weight_map of tensors to files", code="wrong_weights", file=str(index))
        named = {folder / str(name) for name in weight_map.values()}
        if missing := sorted(named - set(files)):
            raise UserError(f"{len(missing)} weight files of the index are missing", file=str(missing[0]))
        if folder / _SINGLE in files and folder / _SINGLE not in named:
            raise UserError(
                f"two sets of weights: {_SINGLE}, and the files that {index.name} names",
                code="wrong_weights",
                file=str(folder),
                hint="remove one of them with the index, or move it elsewhere",
            )
        files = sorted(named)  # others, such as a second copy in another layout, are no part of the model
    elif files and folder / _SINGLE not in files:
        raise UserError(
            f"neither {_SINGLE} nor an index of {len(files)} files such as {files[0].name}",
            code="wrong_weights",
            file=str(folder),
            hint="get model.safetensors.index.json too, or the whole model under its own name",
        )
    if files and (folder / ADAPTER_CONFIG).is_file() and (folder / "config.json").is_file():
        raise UserError(
            f"holds a model and an adapter ({ADAPTER_CONFIG}): which of them is meant is not known",
            code="wrong_weights",
            file=str(folder),
            hint="move the adapter's files into a folder of their own",
        )
    if files:
        return files
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickled:
        raise UserError(
            f"only pickled weights here ({pickled[0].name}), which can run code when loaded",
            file=str(folder),
            hint="convert them once with transformers: save_pretrained(folder, safe_serialization=True)",
        )
    raise UserError(
        f"no *.safetensors weights in this folder{_others(folder)}",
        file=str(folder),
        hint="get those of the same model; where it has none, convert it once: save_pretrained(FOLDER) of transformers",
    )


_FORMS = {
    "*.gguf": "GGUF, of llama.cpp",
    "*.onnx": "ONNX",
    "*.h5": "TensorFlow's",
    "*.msgpack": "Flax's",
    "*.npz": "MLX's",
    "params.json": "the form its authors published first",
}
"""Files in other forms -> whose they are."""


def _others(folder: Path) -> str:
    """What a folder without weights of ours has in their place."""
    for form, what in _FORMS.items():
        for path in [*folder.glob(form), *folder.glob(f"*/{form}")]:
            return f" (it has {path.relative_to(folder)}: {what})"
    return ""


def tensor_types(folder: Path) -> list[tuple[str, str]]:
    """(name, type as safetensors calls it) of the tensors in the files that make up the model, of each file."""
    files, single = weight_files(folder), folder / _SINGLE
    found: list[tuple[str, str]] = []
    for path in [single] if single in files else files:  # other files beside a single one are no part of the model
        with path.open("rb") as stream:
            header, _ = _header(stream, path)
            found += [(name, str(entry["dtype"])) for name, entry in header.items() if name != "__metadata__"]
    return found


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
        if (folder / ADAPTER_CONFIG).is_file():
            raise UserError(
                "holds an adapter and no model",
                code="foreign_adapter",
                file=str(folder),
                hint=f"name the base as the model, and start from the adapter: stages.STAGE.init={folder}",
            )
        raise UserError(f"not a model folder: config.json is missing{_others(folder)}", file=str(folder))
    return _read_object(path)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"not valid JSON ({error})", file=str(path)) from None
    if not isinstance(value, dict):
        raise UserError("expected a JSON object", file=str(path))
    return value


def context_length(config: dict[str, Any]) -> int | None:
    """Longest row in tokens that a model takes, from its config.json; None where it names no limit."""
    config = config.get("text_config") or config
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length"):
        if isinstance(config.get(key), int):
            return int(config[key])
    return None


def check_weight_files(folder: Path) -> None:
    """Refuse missing, pickled or shortened weights by the files' names, headers and sizes; no weight is read.

    Raises:
        UserError: says which file.
    """
    for path in weight_files(folder):
        with path.open("rb") as stream:
            header, start = _header(stream, path)
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        if path.stat().st_size < start + end:
            raise UserError("safetensors file is shorter than its header says", file=str(path))


def _header(stream: Any, path: Path) -> tuple[dict[str, Any], int]:
    """The header of an open safetensors file, and where its tensors begin."""
    size = int.from_bytes(stream.read(8), "little")
    if size.to_bytes(8, "little") == b"version ":
        raise UserError("is a pointer of Git LFS, not the file itself", file=str(path), hint="git lfs pull")
    if size <= 0 or size > path.stat().st_size:
        raise UserError("not a safetensors file (damaged header)", file=str(path))
    try:
        header = json.loads(stream.read(size))
    except (ValueError, UnicodeDecodeError):
        raise UserError("not a safetensors file (damaged header)", file=str(path)) from None
    return dict(header), 8 + size


def base_fingerprint(folder: Path) -> str:
    """SHA-256 over architecture and tensors of a model folder, in hex; remembered while its files do not change."""
    config = read_model_config(folder)
    key, cache = state_of(folder), Remembered("fingerprints.json")
    known = cache.get(key)
    if not isinstance(known, str):
        tensors: dict[str, list[Any]] = {}
        for path in weight_files(folder):
            tensors.update(_tensor_hashes(path))
        kept = {name: value for name, value in config.items() if name not in _VOLATILE}
        known = sha256_json([kept, tensors])
        cache.put(key, known)
    return known


def state_of(folder: Path) -> str:
    """What changes when a model folder's configuration or weight files do, without reading the weights."""
    return sha256_json([read_model_config(folder)] + [_stamp(path) for path in weight_files(folder)])


def _stamp(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino]


def _tensor_hashes(path: Path) -> dict[str, list[Any]]:
    """Name -> [dtype, shape, sha256 of the bytes], read straight from the safetensors layout."""
    with path.open("rb") as stream:
        header, start = _header(stream, path)
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
