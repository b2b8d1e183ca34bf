"""`align run` and `align eval`."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

from align.config.compose import compose
from align.config.schema import RunConfig
from align.planning.preflight import check_sources
from align.run_record import RunRecord
from data_prep.core.errors import UserError


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Run one pipeline, or with `-m` every combination of the swept values."""
    if args.multirun:
        from align.sweeps.sweep import sweep

        return sweep(args.words, args.config_dir)
    config = compose(args.words, args.config_dir)
    if config.swept:
        raise UserError(f"this recipe is a sweep over {' and '.join(config.swept)}", hint="add -m", code="sweep")
    check_sources(config)
    folder = Path(config.out) / config.name
    leads = os.environ.get("RANK", "0") == "0"
    from align import pipeline

    record = pipeline.run(config)
    if leads and not args.json:
        print(closing(config, folder))
    return 0, record


def closing(config: RunConfig, folder: Path) -> str:
    """What a finished run says last: the verdict, where the report is, and what can be done next."""
    from align.report.page import conclusion

    verdict = conclusion(folder)
    lines = ["", verdict["headline"], *textwrap.wrap(" ".join(verdict["sentences"]), 100), ""]
    lines += [f"  {title:<18} {words}" for title, words in _following(config, folder)]
    return "\n".join(lines)


def _following(config: RunConfig, folder: Path) -> list[tuple[str, str]]:
    """(purpose, command) of what can be done after a run."""
    from align.report.run_files import read_json

    align, place = _program(), "" if config.out == "runs" else f" out={config.out}"
    following = [("the whole story", str(folder / "report.html"))]
    run = RunRecord.left_in(folder)
    left = {entry.name: run.at(entry) for entry in run.stages}
    trained = [name for name, at in left.items() if (at / "checkpoint.json").is_file()]
    for at in left.values():
        if override := read_json(at / "result.json", []).get("override"):
            following.append(("use it", f"{align} run {override}"))
    if trained:
        following.append(("what it stands on", f"{align} lineage {config.name}/{trained[-1]}{place}"))
        following.append(("is it intact", f"{align} verify {config.name}{place}"))
    words = [word for word in config.command[2:] if not word.startswith("name=")]
    if len(words) < 4 and not any(word.startswith("adapter") for word in words):
        following.append(("another method", " ".join([align, "run", *words, "adapter=vera"])))
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
    if not args.json:
        folder = Path(result["run"])
        print(f"\nresult: {folder / 'evaluate' / 'result.json'}\nreport: {folder / 'report.html'}")
    return 0, result
