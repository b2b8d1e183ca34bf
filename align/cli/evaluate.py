"""`align eval`: a checkpoint that exists, measured against its ancestors."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from align.checkpoints.resolve import resolve_checkpoint
from align.config.compose import compose
from align.config.schema import ModelOptions, RunConfig
from align.pipeline import run
from align.report.page import conclusion
from align.runs.folder import run_of
from data_prep.core.options import build
from data_prep.options import DataOptions


def evaluate(target: str, overrides: list[str]) -> dict[str, Any]:
    """Evaluate a checkpoint against its ancestors, on the data of the run it comes from unless overridden.

    Returns the content of result.json, the run folder that holds it with its report as "run", what the report says
    first as "verdict", and what it says is worth a second look as "warnings".
    """
    out = next((word.split("=", 1)[1] for word in overrides if word.startswith("out=")), "runs")
    checkpoint = resolve_checkpoint(target, out)
    words = ["pipeline=evaluate", f"stages.evaluate.init={checkpoint.folder.resolve()}"]
    judge = checkpoint.parent("reward")
    if judge is not None:
        words.append(f"stages.evaluate.reward={judge.folder.resolve()}")
    config = _as_recorded(compose([*words, *overrides]), checkpoint.folder, checkpoint.stage, overrides)
    record = run(config)
    folder = Path(config.out) / config.name
    place = folder / record["stages"][-1]["dir"] / "result.json"
    result: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    return {**result, "run": str(folder), "verdict": conclusion(folder), "warnings": record["warnings"]}


def _as_recorded(config: RunConfig, folder: Path, stage: str, overrides: list[str]) -> RunConfig:
    """The evaluation with the model and data that the checkpoint's run recorded, unless they are overridden."""
    recipe = run_of(folder) / "recipe.yaml"
    if not recipe.is_file():
        return config
    recorded = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    stages = recorded["stages"]
    data = stages.get("evaluate", stages.get(stage, {})).get("data")
    given = {word.split("=", 1)[0].lstrip("+") for word in overrides}
    spec, resolved = config.stages[-1], deepcopy(config.resolved)
    if not any(word.split(".")[0] == "model" for word in given):
        resolved["model"] = recorded["model"]
        config = replace(config, model=build(ModelOptions, recorded["model"], "model"))
    if data and not any(word.split(".")[0] == "data" or word.startswith("stages.evaluate.data") for word in given):
        resolved["stages"][spec.name]["data"] = data
        config = replace(config, stages=[replace(spec, data=build(DataOptions, data, "data"))])
    return replace(config, resolved=resolved)
