"""`align run` and `align eval`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from align.config import compose
from align.preflight import check_sources
from data_prep.errors import UserError


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Run one pipeline, or with `-m` every combination of the swept values."""
    if args.multirun:
        from align.sweep import sweep

        return sweep(args.words, args.config_dir)
    config = compose(args.words, args.config_dir)
    check_sources(config)
    print(f"run {config.out}/{config.name}: {' -> '.join(spec.name for spec in config.stages)}", file=sys.stderr)
    from align import pipeline

    return 0, pipeline.run(config, json=args.json)


def evaluate(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Evaluate a checkpoint that exists."""
    if not args.words or "=" in args.words[0]:
        raise UserError("eval needs a TARGET: a path, RUN or RUN/STAGE", code="no_target")
    from align import pipeline

    return 0, pipeline.evaluate(args.words[0], args.words[1:])
