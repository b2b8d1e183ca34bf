"""A plain peft adapter, made elsewhere, as a parent: what its two files say, and what they leave unknown.

`adapter_config.json` gives method and options. Everything in it that this toolkit's method does not have must stand at
peft's default, else the adapter is refused. Unknown stay the base's revision and weights, tokenizer, chat template and
the precision it was trained at: the record has them empty, and `unknown_of` says so in one line.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from align.config.registries import adapters
from data_prep.core.errors import UserError
from data_prep.core.hashing import file_sha256
from data_prep.core.options import build

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UNKNOWN = "unknown"
_NO_EFFECT = {
    *("peft_type", "task_type", "peft_version", "auto_mapping", "inference_mode", "base_model_name_or_path"),
    *("revision", "fan_in_fan_out", "megatron_config", "megatron_core", "runtime_config", "ephemeral_gpu_offload"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "init_lora_weights", "init_weights"),
}
"""Keys that do not change what a trained adapter computes. Initial values are looked at apart."""
_KEEPS_BASE = {True, False, None, "gaussian", "orthogonal", "eva"}
"""Initial values of LoRA that leave the base's weights alone; PiSSA, OLoRA, CorDA and LoftQ change them."""


def is_foreign(folder: Path) -> bool:
    """Whether a folder holds a plain peft adapter: its configuration, and no trace of a checkpoint of this toolkit."""
    own = ("checkpoint.json", "recipe.yaml", "head.safetensors")
    return (folder / CONFIG).is_file() and not any((folder / name).exists() for name in own)


def foreign_record(folder: Path) -> dict[str, Any]:
    """The record of a plain peft adapter, as far as its files give one; equal files give an equal record.

    Raises:
        UserError: no safetensors, a method or an option that is not known here.
    """
    config = _read(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise UserError(
            "only pickled weights here, which can run code when loaded" if pickled else f"{WEIGHTS} is missing",
            code="foreign_adapter",
            file=str(folder),
            hint="save the adapter once with peft: save_pretrained(folder, safe_serialization=True)",
        )
    method, options = _method(config, folder)
    return {
        "format_version": 1,
        "foreign": True,
        "stage": "foreign",
        "method": method,
        "options": options,
        "role": "policy",
        "on_parent": None,
        "root": str(config.get("base_model_name_or_path") or ""),
        "base": {"id": config.get("base_model_name_or_path"), "revision": config.get("revision"), "fingerprint": ""},
        "derived_base": False,
        "load": UNKNOWN,
        "parents": [],
        "tokenizer_digest": "",
        "template_digest": "",
        "files": {name: file_sha256(folder / name) for name in (CONFIG, WEIGHTS)},
        "head": None,
        "metrics": {},
        "inputs_digest": "",
    }


def fitted(record: dict[str, Any], folder: Path, model_config: dict[str, Any]) -> dict[str, Any]:
    """The record with its target layers in their shortest form on this architecture, as a stage's options give them.

    Raises:
        UserError: the adapter names no layer of this architecture, or its file has other tensors than these options.
    """
    from align.adapters.shapes import linear_shapes

    options = dict(record["options"])
    if isinstance(options.get("target_modules"), list):
        chosen = set(linear_shapes(model_config, options["target_modules"]))
        leaves = sorted({name.rpartition(".")[2] for name in chosen})
        for shorter in ("all-linear", leaves):
            if set(linear_shapes(model_config, shorter)) == chosen:
                options["target_modules"] = shorter
                break
    _require_tensors({**record, "options": options}, folder, model_config)
    return {**record, "options": options}


def unknown_of(record: dict[str, Any], folder: Path) -> str:
    """One line: what this adapter is, and what is not known about it."""
    said = ", ".join(f"{key}={value}" for key, value in record["options"].items() if value and key != "method")
    revision = "" if record["base"]["revision"] else "its revision, "
    root = record["root"] or "a base it does not name"
    return (
        f"{folder} is a plain peft adapter ({record['method']}: {said}) for {root}; unknown: {revision}"
        "the base's weights, the tokenizer, the chat template and the precision it was trained with"
    )


def _require_tensors(record: dict[str, Any], folder: Path, model_config: dict[str, Any]) -> None:
    """Refuse a file whose tensors are not those of its options on this model, before any weight loads.

    Raises:
        UserError: a tensor is missing, left over or of another shape.
    """
    import copy

    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    from align.adapters.file_format import refuse_mismatch
    from align.adapters.shapes import meta_model

    adapter: Any = build(adapters.get(record["method"]), record["options"], "options")
    tree = copy.deepcopy(meta_model(model_config))
    vars(tree)["align_shared"] = {}
    carrier = adapter.attach(tree, trainable=False)
    expected = get_peft_model_state_dict(carrier, save_embedding_layers=False)
    file = folder / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as stream:
        saved = {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118  # no mapping
    refuse_mismatch(file, {name: tuple(value.shape) for name, value in expected.items()}, saved)


def require_named_base(record: dict[str, Any], folder: Path, base: Path, names: Collection[str]) -> None:
    """Refuse an adapter whose configuration names another base than the model, its folder or one of its `names`.

    Raises:
        UserError: the names differ; `model.aliases` says that they mean the same model.
    """
    root = str(record["root"])
    known = {*names, str(base), str(base.resolve()), base.name, *_hub_names(base)}
    if root in known or (root and Path(root).expanduser().resolve() == base.resolve()):
        return
    raise UserError(
        f"the adapter was made for {root or 'a base it does not name'}, the model is {next(iter(names), base.name)}",
        code="wrong_base",
        file=str(folder / CONFIG),
        hint=f"if both are the same weights: model.aliases=[{root or chr(39) * 2}]",
    )


def _hub_names(base: Path) -> list[str]:
    """The hub id that a folder of the hub's cache stands for."""
    found = [part for part in base.parts if part.startswith("models--")]
    return [part.removeprefix("models--").replace("--", "/") for part in found]


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"not valid JSON ({error})", file=str(path)) from None
    if not isinstance(config, dict):
        raise UserError("expected a JSON object", file=str(path))
    return config


def _method(config: dict[str, Any], folder: Path) -> tuple[str, dict[str, Any]]:
    """Name and options of the registered method that a peft configuration describes."""
    path, kind = str(folder / CONFIG), str(config.get("peft_type"))
    found: dict[str, tuple[str, Any]] = {
        vars(cls)["peft_type"]: (name, cls)  # its own, not inherited: QLoRA is LoRA on another base
        for name, cls in adapters.items()
        if "peft_type" in vars(cls)
    }
    if kind not in found:
        known = ", ".join(sorted(found))
        raise UserError(f"unknown peft_type (got {kind}; expected one of {known})", code="foreign_adapter", file=path)
    name, cls = found[kind]
    usual = _defaults(kind)
    _refuse_unknown(config, usual, set(cls.peft_names.values()), path)
    options = {ours: config.get(theirs, usual.get(theirs)) for ours, theirs in cls.peft_names.items()}
    if "target_modules" in options:
        options["target_modules"] = _targets(options["target_modules"], path)
    return name, {"method": name, **options}


def _defaults(kind: str) -> dict[str, Any]:
    """What peft takes for keys that a configuration does not have."""
    import dataclasses

    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    fields = dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)])
    return {item.name: item.default for item in fields if item.default is not dataclasses.MISSING}


def _targets(value: Any, path: str) -> Any:
    """Names of layers in a fixed order (peft keeps a set), or `all-linear`; patterns are refused."""
    if value == "all-linear" or (isinstance(value, list) and value):
        return value if isinstance(value, str) else sorted(str(name) for name in value)
    raise UserError(
        f"expected a list of layer names (got {value})", code="foreign_adapter", file=path, field="target_modules"
    )


def _refuse_unknown(config: dict[str, Any], usual: dict[str, Any], known: set[str], path: str) -> None:
    """Every key that no option stands for has peft's default, or no effect."""
    for key, value in config.items():
        if key in known or key in _NO_EFFECT or not value or value == usual.get(key):
            continue
        raise UserError(f"is not known here (got {value})", code="foreign_adapter", file=path, field=key)
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(
            f"not an adapter of a causal language model (got {config['task_type']})",
            code="foreign_adapter",
            file=path,
            field="task_type",
        )
    start = config.get("init_lora_weights")
    if not isinstance(start, bool | str | None) or start not in _KEEPS_BASE:
        raise UserError(
            f"its initial values changed the base's weights (got {start}), which are not in this folder",
            code="foreign_adapter",
            file=path,
            field="init_lora_weights",
            hint="convert it with peft: save_pretrained(folder, path_initial_model_for_weight_conversion=...)",
        )
