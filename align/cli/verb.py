"""What a verb of the command line is."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Verb:
    """A verb of the command line: `module.function(args) -> int` does the work."""

    name: str
    usage: str
    summary: str
    function: str
    multirun: bool = False
    flags: tuple[str, ...] = ()
    """Flags of its own: `--name`, or `--name=VALUE` for one that takes a value."""
    options: str = ""
    """`module:Class` of the options it takes as KEY=VALUE, where they are no overrides of a recipe."""
    actions: tuple[Verb, ...] = ()
    """What the word after the verb may be; each action does its own work."""


def named(place: str) -> Any:
    """The function or class at `module:name`, imported when it is asked for."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
