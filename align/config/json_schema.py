"""The JSON schema (draft 2020-12) of experiments and pipelines, made from the dataclasses that check them.

Editors complete options and underline mistakes by it: `align schema > recipe.schema.json`, and in a recipe's first line
`# yaml-language-server: $schema=recipe.schema.json`.
"""

from __future__ import annotations

import dataclasses
import types
from enum import Enum
from typing import Any, Union, get_args, get_origin

from align.config.registries import adapters, stages
from align.config.schema import RunOptions
from data_prep.core.options import option_types, plain
from data_prep.options import DataOptions

Json = dict[str, Any]
_PLAIN: dict[Any, Json] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": ["string", "number"]},
    Any: {},
}
_REFERENCE: Json = {"type": "string", "pattern": "\\$\\{"}
"""`${...}` may stand in place of any value."""


def recipe_schema() -> Json:
    """The schema of a recipe file that stands at the top: an experiment or a pipeline."""
    methods: Json = {}
    for name, cls in adapters.items():
        methods[name] = _mapping(cls, {"method": {"const": name}}) | {"required": ["method"]}
    adapter = {"anyOf": [*methods.values(), {"type": "object", "not": {"required": ["method"]}}]}
    parts: Json = {name: {"$ref": f"#/$defs/{name}"} for name in ("data", "adapter")}
    every = {name: _mapping(cls, parts) for name, cls in stages.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "align recipe",
        "$defs": {"data": _mapping(DataOptions), "adapter": adapter},
        "type": "object",
        "properties": {
            **_mapping(RunOptions)["properties"],
            "defaults": {"type": "array", "description": "what is composed below this file"},
            **parts,
            "stages": {"type": "object", "properties": every, "additionalProperties": {"type": ["object", "null"]}},
            "hydra": {"type": "object"},
        },
        "additionalProperties": False,
    }


def _mapping(cls: Any, more: Json | None = None) -> Json:
    """A dataclass of options as a mapping of which every key may be left out."""
    hints, properties = option_types(cls), {}
    for each in dataclasses.fields(cls):
        if each.init and each.name not in (more or {}):
            properties[each.name.rstrip("_")] = _described(each, hints[each.name])
    return {"type": ["object", "null"], "properties": {**properties, **(more or {})}, "additionalProperties": False}


def _described(each: Any, kind: Any) -> Json:
    """One option: its type, what it does, and its default."""
    found: Json = {"anyOf": [_of(kind), _REFERENCE]}
    if text := each.metadata.get("help"):
        found["description"] = text
    default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
    if default is not dataclasses.MISSING and not dataclasses.is_dataclass(default):
        found["default"] = plain(default)
    return found


def _of(kind: Any) -> Json:
    """An annotation as a schema."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        inner = [_of(part) for part in parts if part is not type(None)]
        return {"anyOf": [*inner, {"type": "null"}]}
    if origin is list:
        return {"type": "array", "items": {"anyOf": [_of(parts[0]), _REFERENCE]}}
    if origin is dict:
        return {"type": "object", "additionalProperties": {"anyOf": [_of(parts[1]), _REFERENCE]}}
    if dataclasses.is_dataclass(kind):
        return _mapping(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {"enum": [_spelled(name) for name in kind.__members__]}
    return dict(_PLAIN[kind])


def _spelled(name: str) -> Any:
    """YAML reads `true` and `false` as truth values where an enumeration has them as names."""
    return {"true": True, "false": False}.get(name, name)
