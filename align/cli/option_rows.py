"""The options of a dataclass as rows of a table: name, default, help; and where in a recipe each dataclass stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from align.config.registries import adapters, stages
from align.config.schema import DistributedOptions, ModelOptions, TrackingOptions
from align.stages.base import Stage, TrainingStage
from data_prep.options import DataOptions, SourceOptions
from data_prep.records.filter import FILTERS


@dataclass(frozen=True)
class Place:
    """Where in a recipe the options of a dataclass stand."""

    prefix: str
    """What stands before the name of an option: `stages.ppo.`."""
    kind: Any
    """The dataclass."""
    title: str = ""
    """What the place is called, where the class does not say it."""
    of: str = ""
    """stage, adapter or filter: what is registered there."""


def places() -> Iterator[Place]:
    """Every place of a recipe that has options, the common ones first."""
    rows = "data.conversations.  data.preferences.  data.prompts.  data.text."
    yield Place("model.", ModelOptions, "model.")
    yield Place("data.", DataOptions, "data.")
    yield Place("data.KIND.", SourceOptions, rows)
    yield Place("tracking.", TrackingOptions, "tracking.")
    yield Place("distributed.", DistributedOptions, "distributed.")
    yield Place("stages.NAME.", Stage, "stages.NAME.  of every stage")
    yield Place("stages.NAME.", TrainingStage, "stages.NAME.  of every training stage")
    for name, kind in FILTERS.items():
        yield Place(f"data.filters.{name}.", kind, of="filter")
    for name, stage in stages.items():
        yield Place(f"stages.{name}.", stage, of="stage")
    for name, adapter in adapters.items():
        yield Place(f"adapter={name}", adapter, of="adapter")


def options_of(cls: Any, without: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The options of a dataclass: name, default (as YAML shows it) and help."""
    rows = []
    for item in dataclasses.fields(cls):
        if item.name in set(without) or not item.init:
            continue
        default = item.default if item.default is not dataclasses.MISSING else None
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        if dataclasses.is_dataclass(default):
            default = None
        shown = default.name if isinstance(default, Enum) else default
        rows.append({"name": item.name.rstrip("_"), "default": shown, "help": item.metadata.get("help", "")})
    return rows


def described(cls: Any, without: Iterable[str] = ()) -> dict[str, str]:
    """Option -> help and default, for a table."""
    rows = {}
    for row in options_of(cls, without):
        default = row["default"]
        known = f" [{default}]" if default not in (None, "", {}, []) else ""
        rows[row["name"]] = f"{row['help']}{known}"
    return rows


def summary(cls: Any) -> str:
    """First line of a class's docstring."""
    return (cls.__doc__ or "").strip().split("\n")[0].rstrip(".")
