"""The texts of small talk: topics and sentence frames, read from the YAML files in `smalltalk_topics/`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent / "smalltalk_topics"
PARTS = ("meeting", "daily", "fun", "feelings", "world")
"""The files of topics, in the order in which their rows come."""


class Topic(NamedTuple):
    """One topic of the small-talk data set.

    ask: core phrasings. `{a|b|}` is a slot of alternatives (the last one here is empty); a leading `*`
        marks a request, which may take "please". The final mark (`? . !`) is part of the phrasing.
    words: key words of the topic; every answer contains at least one of them.
    facts: sentences about the topic for the stories of the pretraining text.
    social: a greeting, thanks or the like, which takes other openers than a question.
    """

    name: str
    about: str
    words: tuple[str, ...]
    facts: tuple[str, ...]
    ask: tuple[str, ...]
    plain: str
    cheerful: str
    pirate: str
    social: bool = False


class Frames(NamedTuple):
    """Sentence frames, names and places; what their fields mean stands at the top of `frames.yaml`."""

    openers: dict[str, tuple[str, ...]]
    closers: dict[str, tuple[str, ...]]
    names: tuple[str, ...]
    places: tuple[str, ...]
    roles: dict[str, tuple[str, ...]]
    scripts: tuple[str, ...]
    prose: tuple[str, ...]
    notes: tuple[str, ...]
    replies: tuple[str, ...]
    stories: tuple[str, ...]
    lists: tuple[str, ...]
    numbers: tuple[str, ...]


@functools.lru_cache(maxsize=1)
def topics() -> tuple[Topic, ...]:
    """All topics, in the order of their rows; read once."""
    return tuple(Topic(**topic) for part in PARTS for topic in _read(part))


@functools.lru_cache(maxsize=1)
def frames() -> Frames:
    """The sentence frames; read once."""
    return Frames(**_read("frames"))


def _read(name: str) -> Any:
    import yaml

    safe = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, ten times as fast, where PyYAML has it
    return _fixed(safe((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")).get_single_data())


def _fixed(value: Any) -> Any:
    """The same with tuples for the lists inside mappings."""
    if isinstance(value, dict):
        return {key: tuple(one) if isinstance(one, list) else _fixed(one) for key, one in value.items()}
    return [_fixed(one) for one in value] if isinstance(value, list) else value
