"""The options of a dataclass as rows of a table: name, default, help."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from enum import Enum
from typing import Any


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
