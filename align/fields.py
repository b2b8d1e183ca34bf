"""The one way to declare an option: a dataclass field with the string that `--help` prints."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str) -> Any:
    """A dataclass field with a default and its help string."""
    return field(default=default, metadata={"help": help})
