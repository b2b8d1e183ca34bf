"""`align data stats | show | dedup | split | convert FILE`: what is in a file, and files made of it. No weights."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from align.cli.arguments import read_options, say, split_words
from align.cli.data_options import (
    ConvertOptions,
    DedupOptions,
    FileOptions,
    ReadOptions,
    ShowOptions,
    SplitOptions,
    StatsOptions,
)
from data_prep.core.errors import UserError
from data_prep.types import RowKind

if TYPE_CHECKING:
    from data_prep.records.stream import Stream
    from data_prep.rendering.renderer import Renderer

Answer = tuple[int, dict[str, Any]]
T = TypeVar("T", bound=FileOptions)


def stats(args: argparse.Namespace) -> Answer:
    """Say what is in a file; exit code 2 when a run would refuse its rows."""
    path, options = _read(args, StatsOptions)
    from data_prep.filters.leakage import outside_records
    from data_prep.options import OnBadRow
    from data_prep.quality.leakage import HeldOut
    from data_prep.tools.statistics import Statistics, look_at

    stream = _opened(path, options)
    lengths = _token_counter(stream.kind, renderer_of(options.model)) if options.model else None
    held = HeldOut(list(outside_records(options.against, None, whole=True)), options.near) if options.against else None
    answer = {"file": path, **look_at(stream, Statistics(options.near, held), lengths)}
    if not args.json:
        from align.cli.data_tables import print_stats

        print_stats(answer)
    try:
        stream.tally.check_whole()
        stream.tally.check_bad_rows(options.on_bad_row)
        stream.check_left_out()
    except UserError as problem:
        print(problem.in_full("align"), file=sys.stderr)
        return problem.exit_code, {**answer, "error": problem.as_dict()}
    assert options.on_bad_row is OnBadRow.drop or not answer["bad_rows"]
    return 0, answer


def show(args: argparse.Namespace) -> Answer:
    """Print rows as the model sees them, token by token."""
    path, options = _read(args, ShowOptions)
    first, last = _numbers(options.rows)
    from align.cli.terminal import print_rows
    from align.planning.rows import preview

    stream = _opened(path, options)
    records = list(islice(stream, first - 1, last))
    if not records:
        stream.tally.check_bad_rows(options.on_bad_row)
        raise UserError(f"has no row {first} (got {stream.tally.seen} rows)", file=path, code="no_rows")
    bad = stream.tally.first_problems()
    for problem in (*bad, stream.left_out.problem(path), *stream.left_out.warnings(path)):
        if problem is not None:
            print(f"warning  {problem}", file=sys.stderr)
    for note, count in stream.form.notes.items():
        print(f"note     {note}: {count:,}", file=sys.stderr)
    renderer = renderer_of(options.model)
    shown: list[dict[str, Any]] = []
    for row in renderer.render(stream.kind, records):
        if isinstance(row, UserError):
            raise row
        shown += preview(row, stream.kind, renderer.tokenizer)
    if not args.json:
        from rich.console import Console

        print_rows(shown, Console(highlight=False, emoji=False, markup=False), "rows as the model sees them")
    return 0, {"file": path, "kind": stream.kind, "format": stream.form.name, "rows": shown}


def dedup(args: argparse.Namespace) -> Answer:
    """Write the rows without those that repeat an earlier one."""
    path, options = _read(args, DedupOptions)
    to = _target(args, options.to, "to", "FILE.jsonl")
    from data_prep.filters.dedup import Dedup
    from data_prep.tools.convert import dedup as work

    result = work(options.given(path), Dedup(near=options.near, by=options.by), to)
    answer: dict[str, Any] = {"file": path, "to": to, "rows": result.rows(), "removed": result.removed}
    _tell(args, to, _counted(answer["rows"]), *(f"  {line}" for line in result.removed))
    return 0, answer


def split(args: argparse.Namespace) -> Answer:
    """Write two files, to train and to evaluate on, with no question in both."""
    path, options = _read(args, SplitOptions)
    to = {side: _target(args, getattr(options, side), side, f"{side.upper()}.jsonl") for side in ("train", "eval")}
    if "-" in to.values() or to["train"] == to["eval"]:
        raise UserError("are two files (expected two names)", field="train, eval", code="to")
    from data_prep.tools.convert import split as work

    result = work(options.given(path), options.share, options.by, to)
    answer = {"file": path, "to": to, "rows": result.written.rows(), "sides": result.counts, "strata": result.strata}
    _tell(args, "", *(f"{to[side]}: {count:,} rows" for side, count in result.counts.items()))
    for value, counts in list(result.strata.items())[:20]:
        _tell(args, "", f"  {options.by} {value}: {counts['train']:,} train, {counts['eval']:,} eval")
    return 0, answer


def convert(args: argparse.Namespace) -> Answer:
    """Write the rows in another format; what is written is read again and must say the same."""
    path, options = _read(args, ConvertOptions)
    to = _target(args, options.to, "to", "FILE.jsonl")
    from data_prep.tools.convert import convert as work

    result = work(options.given(path), options.form, to)
    answer: dict[str, Any] = {"file": path, "to": to, "form": options.form, "rows": result.rows()}
    answer["format"] = result.stream.form.name
    _tell(args, to, f"{answer['format']} to {options.form}: {_counted(answer['rows'])}")
    return 0, answer


# --------------------------------------------------------------------------------------------------------- insides
def _read(args: argparse.Namespace, kind: type[T]) -> tuple[str, T]:
    """(the file, the checked options) of the words of a command."""
    files, words = split_words(args.words, 1)
    if not files:
        raise UserError("which file? (expected FILE)", code="no_file", hint=f"align {args.action} FILE")
    return os.path.expanduser(files[0]), read_options(kind, words)


def _opened(path: str, options: ReadOptions) -> Stream:
    from data_prep.records.stream import open_any, open_stream

    given = options.given(path)
    return open_any(given) if options.kind is None else open_stream(given, options.kind, 0)


def _target(args: argparse.Namespace, to: str, name: str, example: str) -> str:
    if not to:
        raise UserError("which file is to be written?", field=name, code="to", hint=f"add {name}={example}")
    if to == "-" and args.json:
        raise UserError("standard output holds the JSON answer (expected a file)", field=name, code="to")
    return os.path.expanduser(to)


def _tell(args: argparse.Namespace, to: str, *lines: str) -> None:
    """Print lines; on standard error where the rows went to standard output."""
    if to == "-":
        print(*lines, sep="\n", file=sys.stderr)
    else:
        say(args, *lines)


def _counted(rows: dict[str, Any]) -> str:
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in rows["dropped"].items()) or "none"
    return f"{rows['in']:,} rows in, {rows['kept']:,} written, dropped: {dropped}"


def _numbers(text: str) -> tuple[int, int]:
    """The first and the last row of "N" or "N-M"."""
    first, dash, last = text.replace("..", "-").partition("-")
    if not first.isdigit() or (dash and not last.isdigit()) or not 1 <= int(first) <= int(last or first):
        raise UserError(f"wrong rows (got {text!r}; expected N or N-M, from 1)", field="rows", code="bad_value")
    return min(int(first), sys.maxsize), min(int(last or first), sys.maxsize)


def renderer_of(model: str) -> Renderer:
    """The renderer of a model preset, a folder or a hub id; no weights are read.

    Raises:
        UserError: there is no such model.
    """
    from align.config.compose import compose
    from align.config.hydra_loader import group_choices, recipes
    from align.models.resolve import find_base, open_renderer

    with recipes(None):
        preset = model in group_choices("model")
    words = [f"model={model}"] if preset else ["model=hf", f"model.path={os.path.expanduser(model)!r}"]
    with tempfile.TemporaryDirectory(prefix="align-data-") as scratch:
        return open_renderer(find_base(compose(["pipeline=sft", *words]), Path(scratch), weights=False))


def _token_counter(kind: RowKind, renderer: Renderer) -> Callable[[list[Any]], list[int]]:
    from data_prep.rendering.truncation import length_of

    def count(records: list[Any]) -> list[int]:
        rows = renderer.render(kind, records)
        return [length_of(row) for row in rows if not isinstance(row, UserError)]

    return count
