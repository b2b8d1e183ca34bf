"""`align completion SHELL`: a script that completes verbs, flags, runs, options and their values, holding all it knows.

Nothing of Python runs when Tab is pressed: a start of Python alone is felt. The script knows the recipes and options of
the version that printed it, so that a shell that evaluates it when it starts is up to date.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

from align.cli.help import COMMON
from align.cli.option_rows import places
from align.cli.verb import Verb, named
from align.config.hydra_loader import group_choices, recipes
from align.config.schema import RunOptions
from data_prep.core.errors import UserError
from data_prep.core.options import option_types

_GROUPS = ("adapter", "data", "experiment", "model", "pipeline")
_KINDS = ("conversations", "preferences", "prompts", "text")
SHELLS = ("bash", "zsh", "fish")
RECIPE = "RECIPE"
"""The command under which options of recipes stand, and what a command has that takes them."""


def completion(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Print the script."""
    if len(args.words) != 1 or args.words[0] not in SHELLS:
        known = ", ".join(SHELLS)
        raise UserError(f"completion is for {known}", code="bad_value", hint='eval "$(align completion bash)"')
    with recipes(args.config_dir):
        table = "\n".join(" ".join((command, key, *values)) for command, key, values in rows(args.verbs))
    script = _own("bash").replace("@TABLE@", table)
    if args.words == ["zsh"]:
        script = _own("zsh").replace("@SCRIPT@", script)
    elif args.words == ["fish"]:  # inside quotes there
        script = _own("fish").replace("@SCRIPT@", script.replace("\\", "\\\\").replace("'", "\\'"))
    if not args.json:
        print(script, end="")
    return 0, {"script": script}


def _own(shell: str) -> str:
    return Path(__file__).with_name(f"completion.{shell}").read_text(encoding="utf-8")


Row = tuple[str, str, list[str]]
"""A command, what may stand after it, and the values of that."""


def rows(verbs: Sequence[Verb]) -> Iterator[Row]:
    """Everything that is completed (inside `recipes`); options of recipes last."""
    yield from (("align", verb.name, []) for verb in verbs)
    for verb in verbs:
        yield from (("data", action.name, []) for action in verb.actions)
        for each, command in ((verb, verb.name), *((action, f"data:{action.name}") for action in verb.actions)):
            yield from _of_verb(each, command)
    groups = {group: sorted(group_choices(group)) for group in _GROUPS}
    yield from ((RECIPE, f"{group}=", names) for group, names in groups.items())
    yield from _options(RECIPE, "", RunOptions)
    for place in places():
        if place.of == "adapter":
            yield from _options(RECIPE, "adapter.", place.kind)
        elif place.prefix == "data.KIND.":
            for kind in _KINDS:
                yield from _options(RECIPE, f"data.{kind}.", place.kind)
        elif "NAME" not in place.prefix:
            yield from _options(RECIPE, place.prefix, place.kind)
            if place.of == "stage":
                yield RECIPE, f"{place.prefix}adapter=", groups["adapter"]


def _of_verb(verb: Verb, command: str) -> Iterator[Row]:
    """Flags and options of a verb, or that it takes targets or what recipes have."""
    flags = [flag.partition(" ")[0] for flag in COMMON] + [flag.partition("=")[0] for flag in verb.flags]
    yield from ((command, flag, []) for flag in [*flags, "--help", *(["-m"] if verb.multirun else [])])
    if verb.options:
        yield from _options(command, "", named(verb.options))
    if "TARGET" in verb.usage:
        yield command, "TARGET", []
    if "OVERRIDES" in verb.usage:
        yield command, RECIPE, []


def _options(command: str, prefix: str, cls: Any) -> Iterator[Row]:
    """The options of a dataclass, with the values of switches and choices."""
    kinds = option_types(cls)
    for each in dataclasses.fields(cls):
        if not each.init:
            continue
        kind = next((part for part in get_args(kinds[each.name]) if isinstance(part, type)), kinds[each.name])
        values = ["true", "false"] if kind is bool else []
        if isinstance(kind, type) and issubclass(kind, Enum):
            values = list(kind.__members__)
        if not dataclasses.is_dataclass(kind) and get_origin(kinds[each.name]) is not dict:
            yield command, f"{prefix}{each.name.rstrip('_')}=", values
