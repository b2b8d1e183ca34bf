"""`align eval`: a checkpoint that exists, measured against its ancestors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.checkpoint import read_run, resolve_checkpoint
from align.config import compose
from align.pipeline import run


def evaluate(target: str, overrides: list[str]) -> dict[str, Any]:
    """Evaluate a checkpoint against its ancestors, on the data of the run it comes from unless overridden.

    Returns the content of result.json, and under "run" the run folder that holds it with its report.
    """
    out = next((word.split("=", 1)[1] for word in overrides if word.startswith("out=")), "runs")
    checkpoint = resolve_checkpoint(target, out)
    words = ["pipeline=evaluate", f"stages.evaluate.init={checkpoint.folder.resolve()}"]
    judge = checkpoint.parent("reward")
    if judge is not None:
        words.append(f"stages.evaluate.reward={judge.folder.resolve()}")
    given = {word.split("=", 1)[0].lstrip("+") for word in overrides}
    words += [word for word in _recorded_choices(checkpoint.folder) if word.split("=", 1)[0] not in given]
    config = compose([*words, *overrides])
    entry = run(config)["stages"][-1]
    folder = Path(config.out) / config.name
    result: dict[str, Any] = json.loads((folder / entry["dir"] / "result.json").read_text(encoding="utf-8"))
    return {**result, "run": str(folder)}


def _recorded_choices(folder: Path) -> list[str]:
    """The model and data overrides of the command that made a checkpoint."""
    if not (folder.parent / "run.json").is_file():
        return []
    words = [word for word in read_run(folder.parent).get("command", []) if "=" in word]
    return [word for word in words if word.split("=", 1)[0].split(".", 1)[0] in ("model", "data")]
