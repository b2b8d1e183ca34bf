"""What verbs share: their words, their options as KEY=VALUE, and what they print."""

from __future__ import annotations

import argparse
import os
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import yaml

from align.config.overrides import is_text, parse, raw_value, text_value
from data_prep.core.errors import UserError, nearest
from data_prep.core.options import build, option_types, unknown_key


def say(args: argparse.Namespace, *lines: str) -> None:
    """Print lines for people; with `--json` the object is the answer."""
    if not args.json:
        print("\n".join(lines))


def split_words(words: Sequence[str], most: int) -> tuple[list[str], list[str]]:
    """The plain words of a command and its overrides; at most so many plain words. What exists is a path."""
    plain_words = [word for word in words if ("=" not in word and word[:1] != "~") or _exists(word)]
    if len(plain_words) > most:
        raise UserError(f"unexpected '{plain_words[most]}'", hint="overrides are KEY=VALUE", code="bad_override")
    return plain_words, [word for word in words if word not in plain_words]


def _exists(word: str) -> bool:
    return os.path.exists(os.path.expanduser(word))


def run_folder(overrides: Sequence[str]) -> str:
    """The folder of runs: `out=DIR` among the overrides, the only one that these verbs take."""
    return _places(overrides, ("out",)).get("out", "runs")


def _places(overrides: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """The folders that a verb takes, by name."""
    found = {}
    for override in parse(overrides):
        if override.key_or_group not in known:
            near = nearest(override.key_or_group, known)
            takes = "=DIR and ".join(known)
            raise UserError(
                f"unknown option '{override.key_or_group}'",
                hint=f"did you mean '{near}'?" if near else f"this verb takes {takes}=DIR",
                code="unknown_key",
            )
        found[override.key_or_group] = text_value(override)
    return found


def target_of(args: argparse.Namespace, verb: str) -> tuple[str, str, str | None]:
    """The target of a verb, the folder of runs, and where the base lies now if that is said."""
    words, overrides = split_words(args.words, 1)
    if not words:
        raise UserError(f"{verb} needs a TARGET: a path, RUN or RUN/STAGE", code="no_target")
    places = _places(overrides, ("out", "base"))
    return words[0], places.get("out", "runs"), places.get("base")


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
        place[last] = unquoted if is_text(wanted) else _loaded(text)
    return build(kind, given, "")


def _loaded(text: str) -> Any:
    """A value in YAML; `{a:b}` is `{a: b}`, as recipes and overrides of runs read it."""
    return _spaced(yaml.safe_load(text))


def _spaced(value: Any) -> Any:
    if isinstance(value, list):
        return [_spaced(one) for one in value]
    if not isinstance(value, dict):
        return value
    spaced = {}
    for key, one in value.items():
        name, colon, said = str(key).partition(":")
        if one is None and colon:
            spaced[name] = _loaded(said)
        else:
            spaced[key] = _spaced(one)
    return spaced


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Imports of packages that come with an extra.

    Raises:
        UserError: one is missing; says the command that installs it.
    """
    try:
        yield
    except ImportError as problem:
        hint = f"in the clone: pip install -e '.[{name}]'"
        raise UserError(f"this needs the package {problem.name}", hint=hint, code="missing_extra") from problem


@contextmanager
def progress(doing: str) -> Iterator[Callable[[str], None]]:
    """A line on a terminal that says what is being done, gone when it is done."""
    if not sys.stderr.isatty():
        yield lambda doing: None
        return
    from rich.console import Console
    from rich.status import Status

    with Status(doing, console=Console(stderr=True)) as status:
        yield status.update
