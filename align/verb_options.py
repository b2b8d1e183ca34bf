"""Options of verbs that compose no recipe: the words `KEY=VALUE` of a command as one checked dataclass. No torch."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any, TypeVar

import yaml

from align.overrides import is_text, parse, raw_value
from align.typed import build, option_types, unknown_key

T = TypeVar("T")


def read_options(kind: type[T], words: Sequence[str]) -> T:
    """An instance of the dataclass `kind` from the words of a command; options not given keep their defaults.

    Raises:
        UserError: an unknown option (the nearest is offered) or a value of the wrong type.
    """
    types = option_types(kind)
    given: dict[str, Any] = {}
    for override in parse(words):
        key, text = override.key_or_group, raw_value(override)
        value = override.value()
        unquoted = value if isinstance(value, str) else text
        name, *inside = key.split(".")
        mapping = typing.get_origin(types.get(name)) is dict
        if name not in types or (inside and not mapping):
            raise unknown_key(key, types)
        wanted = typing.get_args(types[name])[1] if inside else types[name]
        place, last = given, name
        for step in inside:  # filters.dedup.near=0.8: into the mapping
            inner = place.setdefault(last, {})
            place, last = inner if isinstance(inner, dict) else {}, step
        place[last] = unquoted if is_text(wanted) else yaml.safe_load(text)
    return build(kind, given, "")
