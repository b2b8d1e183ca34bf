"""The project's override forms, rewritten to what Hydra composes.

    adapter=vera   data=files   model=hf   pipeline=sft    Hydra's own group choices, checked here for the nearest name
    stages.sft.adapter=vera                                ++stages.sft.adapter.method=vera
    stages.sft.data=mine                                   ++stages.sft.data.name=mine
    adapter.rank=8   stages.sft.lr=1e-4   model.load=nf4   the same with `++`, since a preset need not list the key

Whether a value fits is found out after composition (`data_prep/core/options.py`), so that every mistake is reported
in one way. Rewriting its own output changes nothing: sweep jobs rely on it.
"""

from __future__ import annotations

import dataclasses
import keyword
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException

from align.config.foreign_names import unknown_choice
from align.config.safe_values import check_key, check_plain, check_word
from align.config.schema import RunOptions
from data_prep.core.errors import UserError, nearest, unknown
from data_prep.core.options import option_types, unknown_key

GROUPS = ("model", "adapter", "data", "pipeline", "experiment")
"""Config groups with a place at the top of a recipe."""
COMMAND_LINE = "command line"
"""What stands for the file of a value that was typed."""
NAMES = {"adapter": "method", "data": "name"}
"""The key by which a stage's own adapter or data names a preset."""


_PATHS = ("path", "eval_path", "root", "out")
"""Options whose commas are part of a path."""
_FORMS = ("[", "{", "'", '"', "(")
"""How values begin that are meant as a list, a mapping or a quoted text."""


@dataclass(frozen=True)
class Landscape:
    """What overrides may refer to: group choices, and the stages of the chosen pipeline."""

    groups: Mapping[str, Sequence[str]]
    stages: Mapping[str, type]
    """Stage name -> its dataclass."""


def parse(overrides: Sequence[str], sweeps: bool = False) -> list[Override]:
    """Hydra's reading of the overrides; a value that is none of its forms, or a path, is text as it stands.

    Args:
        overrides: the words.
        sweeps: whether commas stand between values of a sweep, in paths too.

    Raises:
        UserError: a word that is not `KEY=VALUE`.
    """
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        if ("=" not in text and not text.startswith("~")) or text.lstrip("+~").startswith("="):
            raise UserError(f"'{text}' is not an override", hint="overrides are KEY=VALUE", code="bad_override")
        words = _read(parser, text, sweeps)
        for override in words:
            _check_plain(override)
        parsed += words
    return parsed


def _read(parser: OverridesParser, text: str, sweeps: bool) -> list[Override]:
    """One word as Hydra reads it; where it cannot, or would take a path apart, with its value in quotes."""
    key, _, value = text.partition("=")
    quoted = f"{key}='{_escaped(value)}'"
    try:
        words = parser.parse_overrides([text])
    except HydraException as problem:
        if os.path.exists(value) or (not value.startswith(_FORMS) and "${" not in value):
            with suppress(HydraException):
                return parser.parse_overrides([quoted])
        hint = "quote a value that holds spaces or any of ,:=~{}[]() as in \"key='value'\""
        raise UserError(f"override '{text}' cannot be read", hint=hint, code="bad_override") from problem
    apart = [word for word in words if word.is_sweep_override() or isinstance(word.value(), list | dict)]
    if apart and not sweeps and (os.path.exists(value) or key.rpartition(".")[2] in _PATHS):
        return parser.parse_overrides([quoted])
    return words


def _escaped(value: str) -> str:
    """A text as it stands between Hydra's single quotes: quotes, and backslashes before them, are escaped."""
    return re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)


def _check_plain(override: Override) -> None:
    """Refuse a word that would make Hydra build objects or read recipes from elsewhere."""
    key = override.key_or_group
    with on_command_line():
        check_key(key)
        check_plain({} if override.is_delete() or override.is_sweep_override() else override.value(), key)
        check_word(str(override.input_line), key)
        if key.startswith("hydra.searchpath"):
            raise UserError("recipes come from one folder", field=key, hint="--config-dir DIR", code="bad_override")


@contextmanager
def on_command_line() -> Iterator[None]:
    """Errors about overrides say that they were typed."""
    try:
        yield
    except UserError as problem:
        problem.file = problem.file or COMMAND_LINE
        raise


def is_group(override: Override) -> bool:
    """Whether an override chooses from a config group (with or without `@package`)."""
    key = override.key_or_group
    return override.package is not None or key in GROUPS or "/" in key or key.split(".")[0] == "hydra"


def raw_value(override: Override) -> str:
    """The right-hand side as typed."""
    return str(override.input_line or "").partition("=")[2]


def text_value(override: Override) -> str:
    """The right-hand side as a text, without the quotes around it."""
    value = None if override.is_sweep_override() else override.value()
    return value if isinstance(value, str) else raw_value(override)


def first_choice(override: Override) -> str:
    """The override with a sweep replaced by its first value."""
    if not override.is_sweep_override():
        return str(override.input_line)
    key = str(override.input_line).partition("=")[0]
    return f"{key}={next(iter(_choices(override)), 'null')}"


def rewrite(overrides: Iterable[Override], land: Landscape) -> list[str]:
    """The overrides in Hydra's form.

    Raises:
        UserError: an unknown group choice, stage or top-level key, with the nearest valid name.
    """
    with on_command_line():
        return [_rewrite_one(override, land) for override in overrides]


def _rewrite_one(override: Override, land: Landscape) -> str:
    """One override in Hydra's form."""
    key, text = override.key_or_group, str(override.input_line)
    parts = key.split(".")
    if key.startswith("hydra") and parts[0].split("/")[0] == "hydra":
        return text
    group = key.split("/")[0] if override.package is None else key
    if (override.package is not None or "/" in key) and group not in (*GROUPS, "stage"):
        raise unknown("group", group, (*GROUPS, "stage"))
    if override.package is not None or "/" in key:
        return text
    if key in GROUPS:
        check_choice(override, land)
        return text
    if parts[0] == "stages" and len(parts) > 1 and parts[1] not in land.stages:
        raise unknown("stage", parts[1], land.stages)
    if parts[0] not in option_types(RunOptions):
        raise unknown_top_key(key, land)
    if key == "adapter.method":
        raise UserError(
            "an adapter is chosen as a whole", field=key, hint=f"adapter={raw_value(override)}", code="bad_override"
        )
    if override.is_delete():
        return text
    if len(parts) == 3 and parts[2] in NAMES and _is_name(override):
        return f"++{key}.{NAMES[parts[2]]}={raw_value(override)}"
    parts = [f"{part}_" if keyword.iskeyword(part) else part for part in parts]
    return f"++{'.'.join(parts)}={_value(override, parts, land)}"


def _value(override: Override, parts: Sequence[str], land: Landscape) -> str:
    """The value as typed; one for a text option is quoted, so that `0012` or `12e4` stay what they are."""
    raw = raw_value(override)
    value = override.value()
    if not isinstance(value, (bool, int, float)) or override.is_sweep_override():
        return raw
    return f"'{raw}'" if is_text(type_of(parts, land)) else raw


def type_of(parts: Sequence[str], land: Landscape) -> Any:
    """The annotation of the option at a dotted path, or None where it is not known before composition."""
    here: Any = RunOptions
    steps = list(parts)
    if steps[0] == "stages" and len(steps) > 2:
        here, steps = land.stages.get(steps[1]), steps[2:]
    for step in steps:
        if not (isinstance(here, type) and dataclasses.is_dataclass(here)):
            return None
        here = option_types(here).get(step)
    return here


def is_text(kind: Any) -> bool:
    """Whether an annotation is `str` or `Optional[str]`."""
    return kind is str or set(getattr(kind, "__args__", ())) == {str, type(None)}


def _is_name(override: Override) -> bool:
    """Whether the value is the name of a preset (or a sweep over names), not a mapping or null."""
    value = override.value()
    return value is not None and not isinstance(value, dict)


def check_choice(override: Override, land: Landscape) -> None:
    """Refuse a choice that the group does not have; `null` is for the group `experiment` alone."""
    group = override.key_or_group
    choices = land.groups.get(group, ())
    for name in _choices(override):
        if name in choices or (name == "null" and group == "experiment"):
            continue
        if group == "data" and ("." in name or "/" in name) and nearest(name, choices) is None:
            raise UserError(
                f"unknown data '{name}' (choices: {', '.join(sorted(choices))})",
                hint=f"for a file: data=files data.path={name}",
                code="unknown_data",
            )
        if group == "model" and ("." in name or "/" in name) and nearest(name, choices) is None:
            raise UserError(
                f"unknown model '{name}' (choices: {', '.join(sorted(choices))})",
                hint=f"for a folder or hub id: model=hf model.path={name}",
                code="unknown_model",
            )
        raise unknown_choice(group, name, choices)


def _choices(override: Override) -> list[str]:
    """Every value an override stands for, as text."""
    if override.is_sweep_override():
        if override.is_discrete_sweep():
            return [str(item) for item in override.sweep_string_iterator()]
        return []
    value = override.value()
    if isinstance(value, QuotedString):
        return [value.text]
    return ["null" if value is None else raw_value(override)]


def unknown_top_key(key: str, land: Landscape) -> UserError:
    """The error for a key with no place at the top of a recipe; `lr=1` is told about `stages.sft.lr`."""
    first = key.split(".")[0]
    top = [*option_types(RunOptions), "pipeline", "experiment"]
    for name, cls in land.stages.items():
        if first in option_types(cls):
            owners = [stage for stage, kind in land.stages.items() if first in option_types(kind)]
            hint = f"did you mean 'stages.{name}.{key}'?"
            more = f" (also in: {', '.join(owners[1:])})" if len(owners) > 1 else ""
            return UserError(f"unknown option{more}", field=key, hint=hint, code="unknown_key")
        if first == name:
            return UserError("unknown option", field=key, hint=f"did you mean 'stages.{key}'?", code="unknown_key")
    return unknown_key(first, top)
