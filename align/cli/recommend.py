"""`align recommend`: a method and settings for a goal, a run and a device, with the reasons."""

from __future__ import annotations

import argparse
from typing import Any

from align.cli.arguments import progress, say
from align.cli.own_files import with_files
from align.cli.plan import device_named, gigabytes
from align.config.compose import compose
from align.config.registries import adapters
from data_prep.core.errors import UserError, unknown

_OWN = ("device", "goal")


def recommend(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Print what to take, and what was looked at before it."""
    own = dict(word.split("=", 1) for word in args.words if word.partition("=")[0] in _OWN and "=" in word)
    words = with_files([word for word in args.words if word.partition("=")[0] not in _OWN])
    if any(word.partition("=")[0] == "adapter" for word in words):
        raise UserError("is what recommend looks for", field="adapter", hint="leave it out", code="bad_override")
    from align.planning.recommend import Goal, advise

    if own.get("goal", "quality") not in Goal.__members__:
        raise unknown("goal", own["goal"], Goal.__members__)
    goal, device = Goal[own.get("goal", "quality")], device_named(own.get("device", "auto"))
    size = _parameters(words, args.config_dir)
    looked: list[dict[str, Any]] = []
    with progress("planning") as told:
        for advice in advise(words, args.config_dir, goal, device, size, told):
            found = {
                "adapter": advice.candidate.method,
                "why": advice.candidate.why,
                "overrides": advice.overrides,
                "peak_bytes": advice.peak_bytes,
                "stage": advice.stage,
                "fits": advice.fits,
            }
            looked.append(found)
            if not advice.fits:
                say(args, f"not {found['adapter']}: {gigabytes(advice.peak_bytes)} in {advice.stage}, too much")
    last = looked[-1]
    answer = {"goal": goal.name, "device": device.name, "parameters": size, "looked_at": looked, "fits": last["fits"]}
    if not last["fits"]:
        raise UserError(
            f"no method that is known to be good here fits {device.name} ({gigabytes(device.bytes)})",
            code="nothing_fits",
            hint="a smaller base, shorter rows, or another device=",
        )
    chosen = ["align", "run", *words, f"adapter={last['adapter']}", *last["overrides"]]
    say(args, f"adapter={last['adapter']}", f"  {last['why']}")
    say(args, f"  {gigabytes(last['peak_bytes'])} at its highest, in {last['stage']}, of {gigabytes(device.bytes)}")
    say(args, "", f"  {' '.join(chosen)}")
    return 0, {**answer, "command": chosen}


def _parameters(words: list[str], config_dir: str | None) -> int:
    """How many parameters the run's base has, by its config.json."""
    import tempfile
    from pathlib import Path

    from align.models.fingerprint import read_model_config
    from align.models.resolve import find_base

    config = compose(words, config_dir)
    with tempfile.TemporaryDirectory(prefix="align-recommend-") as scratch:
        model_config = read_model_config(find_base(config, Path(scratch), weights=False))
    full: Any = adapters.get("full")
    return int(full().count(model_config).total)
