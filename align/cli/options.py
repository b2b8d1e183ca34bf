"""`align options WORD`: options of recipes by name or by what they do; `align schema`: all of them for editors."""

from __future__ import annotations

import argparse
import json
from typing import Any

from align.cli.arguments import say
from align.cli.option_rows import options_of, places
from align.stages.base import Stage, TrainingStage
from data_prep.core.errors import UserError, nearest


def options(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Print the options that have all words in their name or help, each as it is written in a command."""
    words = [word.lower() for word in args.words]
    if not words:
        raise UserError("options needs a WORD: a part of a name or of what it does", code="no_word")
    every = list(_rows())
    found = [row for row in every if all(word in f"{row['option']} {row['help']}".lower() for word in words)]
    if not found:
        near = nearest(words[0], {row["option"].rpartition(".")[2] for row in every})
        said = f"did you mean '{near}'?" if near else "align run --help prints them all"
        raise UserError(f"no option has {' and '.join(words)} in its name or help", code="unknown_option", hint=said)
    width = min(44, max(len(row["option"]) for row in found))
    for row in found:
        default = "" if row["default"] in (None, "", {}, []) else f" [{row['default']}]"
        say(args, f"{row['option']:<{width}}  {row['help']}{default}")
    return 0, {"options": found}


def _rows() -> list[dict[str, Any]]:
    """Every option once: what all stages have stands with all of them, and not with each."""
    rows: list[dict[str, Any]] = []
    common: dict[type, list[dict[str, Any]]] = {kind: options_of(kind) for kind in (Stage, TrainingStage)}
    for place in places():
        shared = common[Stage] if place.kind is TrainingStage else []
        if place.of == "stage":
            shared = common[TrainingStage]
        for row in options_of(place.kind, {"method", "data", "adapter"}):
            if row not in shared:
                start, method = (place.prefix, "") if place.of != "adapter" else ("adapter.", f" ({place.prefix})")
                rows.append({**row, "option": f"{start}{row.pop('name')}", "help": f"{row['help']}{method}"})
    return rows


def schema(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Print the JSON schema of recipes, which editors complete and check YAML files by."""
    from align.config.json_schema import recipe_schema

    if args.words:
        raise UserError(f"unexpected '{args.words[0]}'", hint="align schema takes no words", code="bad_override")
    found = recipe_schema()
    say(args, json.dumps(found, indent=1))
    return 0, found
