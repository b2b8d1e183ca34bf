"""Which linear layers a method targets: `all-linear`, or a list of names."""

from __future__ import annotations

from typing import Any

from align.fields import option
from data_prep.errors import UserError


def targets_option() -> Any:
    """The option field shared by every method that targets linear layers."""
    return option("all-linear", "linear layers to adapt: all-linear (the head excepted) or a list of names")


def resolve_targets(targets: Any) -> str | list[str]:
    """Check the option's value; returns what peft takes."""
    if targets == "all-linear":
        return "all-linear"
    if isinstance(targets, str):
        return [targets]
    names = [str(name) for name in targets]
    if not names:
        raise UserError("target_modules is empty", hint="give names such as [q_proj,v_proj], or all-linear")
    return names
