"""Verbs from checkpoints to other forms: `align ship | merge | export | extract | compress | combine | count`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from align.checkpoints.resolve import resolve_checkpoint
from align.cli.arguments import extra, read_options, say, split_words
from align.cli.evaluate import recorded_recipe
from align.weights.options import (
    GGUF,
    CombineOptions,
    CompressOptions,
    ExportOptions,
    ExtractOptions,
    MergeOptions,
    ShipOptions,
    To,
)
from data_prep.core.errors import UserError

Answer = tuple[int, dict[str, Any]]


def ship(args: argparse.Namespace) -> Answer:
    """Bring a checkpoint to the tool that shall load it."""
    target, words = _target(args, "ship")
    options = read_options(ShipOptions, words)
    if options.to in GGUF:
        with extra("gguf"):
            import gguf  # noqa: F401
    if options.to is To.ollama and options.system is None:
        options.system = _recorded_system(target, options.out)
    from align.weights.ship import ship as work

    answer = work(target, options, args.force)
    say(args, f"to={answer['to']}, as {answer['form']}: {answer['why']}")
    _told(args, answer)
    say(args, *(f"  {note}" for note in answer.get("notes", [])))
    for line in answer.get("commands", []):
        say(args, f"  {line}")
    if "repo" in answer:
        _upload_told(args, answer)
    return 0, answer


def _recorded_system(target: str, out: str) -> str | None:
    """The system prompt of rows without one in the run that TARGET comes from."""
    checkpoint = resolve_checkpoint(target, out)
    recipe = recorded_recipe(checkpoint)
    stage = recipe["stages"].get(checkpoint.stage) if recipe else None
    return stage["data"].get("system") if stage and stage.get("data") else None


def _upload_told(args: argparse.Namespace, answer: dict[str, Any]) -> None:
    """What an upload is, or would be."""
    sizes = answer["files"]
    say(args, f"  {answer['repo']}: {len(sizes)} files, {_bytes(sum(sizes.values()))}")
    say(args, *(f"    {_bytes(size):>9}  {name}" for name, size in sizes.items()))
    if answer["url"]:
        say(args, f"  uploaded: {answer['url']}")
        return
    say(args, "", (Path(answer["out"]) / "README.md").read_text(encoding="utf-8"))
    say(args, "nothing was uploaded: push=true uploads this folder as it is now")


def merge(args: argparse.Namespace) -> Answer:
    """Fold a checkpoint into one set of weights."""
    target, words = _target(args, "merge")
    options = read_options(MergeOptions, words)
    from align.weights.merge import merge as work

    return _told(args, work(target, options, args.force))


def export(args: argparse.Namespace) -> Answer:
    """Write a checkpoint in the form that another tool loads."""
    target, words = _target(args, "export")
    options = read_options(ExportOptions, words)
    from align.weights.export import export as work

    return _told(args, work(target, options, args.force))


def extract(args: argparse.Namespace) -> Answer:
    """A full fine-tune minus its base, as a LoRA."""
    target, words = _target(args, "extract")
    options = read_options(ExtractOptions, words)
    from align.weights.extract import extract as work

    return _told(args, work(target, options))


def compress(args: argparse.Namespace) -> Answer:
    """A low-rank adapter at a smaller rank."""
    target, words = _target(args, "compress")
    options = read_options(CompressOptions, words)
    from align.weights.extract import compress as work

    return _told(args, work(target, options, args.force))


def combine(args: argparse.Namespace) -> Answer:
    """Adapters of several tasks as one."""
    targets, words = split_words(args.words, len(args.words))
    options = read_options(CombineOptions, words)
    from align.weights.combine import combine as work

    answer = work(targets, options)
    say(args, f"{answer['how']} of {answer['of']}: {answer['out']}", f"  rank {answer['rank']} at most")
    say(args, f"  {'held-out loss of':<28}{'base':>9}{'own':>9}{'combined':>10}")
    for name, row in answer["losses"].items():
        say(args, f"  {name:<28}{row['base']:>9.4f}{row['own']:>9.4f}{row['combined']:>10.4f}")
    return 0, answer


def count(args: argparse.Namespace) -> Answer:
    """Parameters of a method on an architecture, without weights."""
    from align.weights.count import count as work

    answer = work(args.words, args.config_dir)
    say(
        args,
        f"{'stage':<14}{'method':<18}{'trainable':>14}{'frozen':>14}{'head':>9}{'total':>16}{'share':>10}  adapter",
    )
    for name, row in answer["stages"].items():
        numbers = f"{row['trainable']:>14,}{row['frozen']:>14,}{row['head']:>9,}{row['total']:>16,}"
        say(args, f"{name:<14}{row['method']:<18}{numbers}{row['share']:>10.4%}  {_bytes(row['adapter_bytes'])}")
    return 0, answer


def _target(args: argparse.Namespace, verb: str) -> tuple[str, list[str]]:
    """TARGET and the options."""
    names, words = split_words(args.words, 1)
    if not names:
        raise UserError(f"{verb} needs a TARGET: a path, RUN or RUN/STAGE", code="no_target")
    if args.config_dir:
        raise UserError(f"{verb} takes no recipes", field="--config-dir", code="bad_flag")
    return names[0], words


def _told(args: argparse.Namespace, answer: dict[str, Any]) -> Answer:
    """Say in words what was written and how far it is from what was trained."""
    drift = answer["drift"]
    say(args, f"{answer['form']}: {answer['out']}", f"  from {answer['of']}")
    if "rank" in answer:
        lost = [layer["lost"] for layer in answer["layers"].values()]
        say(args, f"  rank {answer['rank']} at most; relative error of a layer {max(lost):.2%} at most")
    if answer.get("uncovered"):
        worst = max(answer["uncovered"], key=answer["uncovered"].get)
        say(
            args,
            f"  {len(answer['uncovered'])} changed tensors cannot be in a LoRA "
            f"(most: {worst}, {answer['uncovered'][worst]:.2%})",
            f"  {answer['explained']:.1%} of the change of the logits is reproduced",
        )
    say(
        args,
        f"  against what was trained, on {drift['tokens']} tokens: largest difference {drift['max_logit']:.2e}, "
        f"KL {drift['kl']:.2e}, same first choice {drift['argmax_agreement']:.2%}",
    )
    return 0, answer


def _bytes(number: int) -> str:
    """A size in the unit that suits it."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"
