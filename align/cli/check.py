"""`align check`: what a run would do and what is wrong with it, before anything is trained."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from align.cli.arguments import progress
from align.cli.own_files import with_files
from align.config.compose import compose
from align.config.schema import RunConfig
from align.planning.findings import WORDS, Findings
from data_prep.core.errors import UserError

if TYPE_CHECKING:
    from align.planning.rows import Shelf


def check(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Print findings and problems; exit code 2 when `align run` would be refused, or with `--strict` on any warning."""
    config, mistakes = composed(with_files(args.words), args.config_dir)
    if config is None:
        found = Findings()
        found.add(None, mistakes)
        if not args.json:
            print(*(f"{WORDS['error']}  {problem}" for problem in found.problems), found.verdict(), sep="\n")
        return 2, {**found.as_dict(), "error": mistakes[0].as_dict()}
    from align.planning.check import check as look
    from align.planning.rows import Shelf

    shelf = Shelf(Findings())
    with progress("checking") as say:
        found = look(config, say, shelf)
        if found.ok and not args.json:
            _add_memory(shelf, config, say)
    if not args.json:
        _print(found)
    return (2 if not found.ok or (args.strict and found.warnings) else 0), found.as_dict()


def composed(words: list[str], config_dir: str | None) -> tuple[RunConfig | None, list[UserError]]:
    """The run, or every mistake in it: an override that is refused is left out to see the next."""
    left, mistakes = list(words), list[UserError]()
    while True:
        try:
            config = compose(left, config_dir)
        except UserError as problem:
            mistakes.append(problem)
            guilty = [word for word in left if problem.field and word.partition("=")[0].strip("+~") == problem.field]
            left = [word for word in left if word not in guilty]
            if not guilty or not left:
                return None, mistakes
        else:
            return (None, mistakes) if mistakes else (config, [])


def _add_memory(shelf: Shelf, config: RunConfig, say: Callable[[str], None]) -> None:
    """A line of what `align plan` says of every stage on this machine; nothing is refused because of it."""
    from align.cli.plan import device_named, in_words
    from align.planning.plan import plan

    found, device, lines = shelf.found, device_named("auto"), dict[str, str]()
    try:
        for name, needs in plan(config, device, say, shelf):
            fits = "" if needs.memory.high <= device.bytes else f", too much for {device.name}: see align plan"
            lines[name] = in_words(needs.memory) + fits
    except UserError as problem:
        lines |= {stage["name"]: str(problem) for stage in found.stages if stage["name"] not in lines}
    for stage in found.stages:
        stage["memory"] = lines[stage["name"]]


def _print(found: Findings) -> None:
    from rich.console import Console

    from align.cli.terminal import print_findings

    print_findings(found, Console(highlight=False, emoji=False, markup=False))
