"""Options of verbs that compose no recipe: the words `KEY=VALUE` of a command as one checked dataclass. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

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
    given: dict[str, object] = {}
    for override in parse(words):
        key, text = override.key_or_group, raw_value(override)
        if key not in types:
            raise unknown_key(key, types)
        value = override.value()
        unquoted = value if isinstance(value, str) else text
        given[key] = unquoted if is_text(types[key]) else yaml.safe_load(text)
    return build(kind, given, "")
