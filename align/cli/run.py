"""`align run` and `align eval`."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from align.cli.own_files import with_files
from align.config.compose import compose
from align.config.schema import RunConfig
from align.planning.preflight import check_sources
from align.report.formatting import plural, visible
from align.report.run_files import Json, read_json
from align.run_record import RunRecord
from data_prep.core.errors import UserError


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Run one pipeline, or with `-m` every combination of the swept values."""
    words = with_files(args.words)
    if args.multirun:
        from align.sweeps.sweep import sweep

        code, answer = sweep(words, args.config_dir)
        jobs = Path(answer["dir"]).glob("jobs/*/run.json")
        return code or _code(args, [one for job in jobs for one in read_json(job, []).get("warnings") or []]), answer
    config = compose(words, args.config_dir)
    if config.swept:
        raise UserError(f"this recipe is a sweep over {' and '.join(config.swept)}", hint="add -m", code="sweep")
    check_sources(config)
    folder = Path(config.out) / config.name
    leads = os.environ.get("RANK", "0") == "0"
    from align import pipeline

    record = pipeline.run(config)
    if leads and not args.json:
        print(closing(config, folder, record.get("warnings", [])))
    return _code(args, record.get("warnings", [])), record


def _code(args: argparse.Namespace, warnings: Sequence[Json]) -> int:
    """The exit code of what is done: 0, or 2 where warnings were to be counted as failures."""
    if not args.strict or not warnings:
        return 0
    print(f"align: --strict: {plural(len(warnings), 'warning')}; what was made stays", file=sys.stderr)
    return UserError.exit_code


def closing(config: RunConfig, folder: Path, warnings: Sequence[Json]) -> str:
    """What a finished run says last: the verdict, the warnings, where the report is, and what can be done next."""
    lines = [*_judged(folder, warnings), ""]
    lines += [f"  {title:<18} {words}" for title, words in _following(config, folder)]
    return "\n".join(lines)


def _judged(folder: Path, warnings: Sequence[Json]) -> list[str]:
    """The verdict of a run, and what is worth a second look, wrapped."""
    from align.report.notices import told
    from align.report.page import conclusion

    verdict = conclusion(folder)
    lines = ["", verdict["headline"], *textwrap.wrap(" ".join(verdict["sentences"]), 100)]
    for number, warning in enumerate(warnings):
        lines += ["", "Worth a second look:"] if number == 0 else []
        lines += textwrap.wrap(visible(told(warning)), 96, initial_indent="  - ", subsequent_indent="    ")
    return lines


def _following(config: RunConfig, folder: Path) -> list[tuple[str, str]]:
    """(purpose, command) of what can be done after a run."""
    align, place = _program(), "" if config.out == "runs" else f" out={quote(config.out)}"
    following = [("the whole story", str(folder / "report.html"))]
    run = RunRecord.left_in(folder)
    left = {entry.name: run.at(entry) for entry in run.stages}
    trained = [name for name, at in left.items() if (at / "checkpoint.json").is_file()]
    for at in left.values():
        if override := read_json(at / "result.json", []).get("override"):
            following.append(("use it", f"{align} run {override}"))
    policies = [name for name in trained if read_json(left[name] / "checkpoint.json", []).get("role") == "policy"]
    if policies:
        target = quote(f"{config.name}/{policies[-1]}") + place
        following.append(("talk to it", f"{align} chat {target}"))
        following.append(("one set of weights", f"{align} merge {target}"))
        following.append(("for other tools", f"{align} export {target}"))
    if trained:
        following.append(("what it stands on", f"{align} lineage {quote(f'{config.name}/{trained[-1]}')}{place}"))
        following.append(("is it intact", f"{align} verify {quote(config.name)}{place}"))
    words = [word for word in config.command[2:] if not word.startswith("name=")]
    if len(words) < 4 and not any(word.startswith("adapter") for word in words):
        following.append(("another method", " ".join([align, "run", *map(quote, words), "adapter=vera"])))
    if all(spec.data.name != "files" for spec in config.stages):
        following.append(("your own data", f"{align} run pipeline=sft data=files data.path=my.jsonl"))
    return following


def _program() -> str:
    """How this command is called here: `align` where it is on the PATH, else its place (`.venv/bin/align`)."""
    found, called = shutil.which("align"), Path(sys.argv[0])
    if called.name != "align" or (found and Path(found).resolve() == called.resolve()):
        return "align"
    return os.path.relpath(called)


def evaluate(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Evaluate a checkpoint that exists."""
    if not args.words or "=" in args.words[0]:
        raise UserError("eval needs a TARGET: a path, RUN or RUN/STAGE", code="no_target")
    if args.config_dir:
        raise UserError("eval takes its recipes from the run it evaluates", field="--config-dir", code="bad_flag")
    from align.cli import evaluate as evaluation

    result = evaluation.evaluate(args.words[0], args.words[1:])
    if not args.json and os.environ.get("RANK", "0") == "0":
        folder = Path(result["run"])
        print(*_judged(folder, result["warnings"]), sep="\n")
        print(f"\nresult: {folder / 'evaluate' / 'result.json'}\nreport: {folder / 'report.html'}")
    return _code(args, result["warnings"]), result
