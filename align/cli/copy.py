"""`align cp RECIPE DIR`: a recipe and all that it names, as files of one's own."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from align.cli.arguments import say, split_words
from align.config.compose import checked_name
from align.config.hydra_loader import compose_choices, group_choices, recipe_file, recipes
from align.config.origins import files_of, shown_file, value_paths
from align.config.overrides import GROUPS
from data_prep.core.errors import UserError, unknown

ORDER = ("experiment", "pipeline", "data", "model", "adapter")
"""Where a bare name is looked for first."""


def cp(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Copy a recipe; `align run --config-dir DIR` then takes the copies before the project's own."""
    words = [word.replace("=", "/", 1) for word in args.words]
    if len(words) != 2:
        split_words(words, 2)
        raise UserError("cp needs a RECIPE and a DIR: align cp persona_rlhf my_recipes", code="no_target")
    folder = Path(words[1])
    with recipes(args.config_dir):
        group, name = found_recipe(words[0])
        own = checked_name(getattr(args, "as") or name)
        sources = files_of(f"{group}/{name}")
        copies = {folder / each.parent.name / each.name: each for each in sources.values()}
        first = folder / group / f"{own}.yaml"
        copies = {first if source == sources[f"{group}/{name}"] else to: source for to, source in copies.items()}
        missing = _missing(f"{group}={name}")
        shown = {str(to): shown_file(source) for to, source in copies.items()}
    _write(copies)
    command = ["align", "run", f"{group}={own}", *(f"{key}=VALUE" for key in missing), "--config-dir", str(folder)]
    say(args, *(f"{to}  from {source}" for to, source in shown.items()), "", f"next: {shlex.join(command)}")
    return 0, {"files": shown, "recipe": f"{group}={own}", "missing": missing, "next": command}


def found_recipe(target: str) -> tuple[str, str]:
    """Group and name of `NAME`, `GROUP/NAME` or `GROUP=NAME`.

    Raises:
        UserError: no such recipe, or a choice that is code and has no file.
    """
    group, _, name = target.rpartition("/")
    if group and group not in GROUPS:
        raise unknown("group", group, GROUPS)
    choices = {each: group_choices(each) for each in ([group] if group else ORDER)}
    group = next((each for each, names in choices.items() if name in names), "")
    if not group:
        raise unknown("recipe", name, {name for names in choices.values() for name in names})
    if recipe_file(f"{group}/{name}") is None:
        raise UserError(
            f"{group}={name} is a registered {group}, not a file",
            code="no_file",
            hint=f"a recipe of your own names it: defaults: [{name}, _self_]",
        )
    return group, name


def _missing(choice: str) -> list[str]:
    """The options that the user has to give: `???` in what the choice composes."""
    tree = compose_choices("config", [choice]).content()
    return [path for path, value in value_paths(tree) if value == "???"]


def _write(copies: dict[Path, Path]) -> None:
    """Copy every file, or none.

    Raises:
        UserError: one is there already, or the folder cannot be written.
    """
    for to in copies:
        if to.exists():
            raise UserError(
                "is there already, and nothing was copied", file=str(to), code="exists", hint="take another DIR or --as"
            )
    for to, source in copies.items():
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(source.read_bytes())
        except OSError as problem:
            raise UserError(f"cannot write ({problem.strerror})", file=str(to), code="cannot_write") from None
