"""`align eval`: a checkpoint that exists, measured against its ancestors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from align.checkpoints.checkpoint import Checkpoint
from align.checkpoints.peft_adapter import is_foreign
from align.checkpoints.resolve import is_model, resolve_checkpoint
from align.config.compose import compose
from align.config.schema import ModelOptions, RunConfig, RunOptions
from align.models.chat_template import bare
from align.pipeline import run
from align.planning.preflight import check_sources
from align.report.page import conclusion
from align.runs.folder import run_of
from align.stages.evaluate import Evaluate
from data_prep.core.options import build
from data_prep.options import DataOptions


def evaluate(target: str, overrides: list[str]) -> dict[str, Any]:
    """Evaluate a checkpoint against its ancestors, on the data of the run it comes from unless overridden.

    Returns the content of result.json, the run folder that holds it with its report as "run", what the report says
    first as "verdict", and what it says is worth a second look as "warnings".
    """
    overrides = in_full(overrides)
    out = _given(overrides, "out") or "runs"
    base, overrides = _given(overrides, "base"), [word for word in overrides if not word.startswith("base=")]
    path = Path(target).expanduser()
    if is_foreign(path):
        root = str(Checkpoint.open(path).record["root"])
        words = _plain(base or root, str(path.resolve()))
        config = compose([*words, f"model.aliases=['{root}']", *overrides])
    elif is_model(path):
        config = compose([*_plain(target, "base"), *overrides])
    else:
        config = _of_checkpoint(resolve_checkpoint(target, out), base, overrides)
    check_sources(config)
    record = run(config)
    folder = Path(config.out) / config.name
    place = folder / record["stages"][-1]["dir"] / "result.json"
    result: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    return {**result, "run": str(folder), "verdict": conclusion(folder), "warnings": record["warnings"]}


def in_full(words: Sequence[str]) -> list[str]:
    """Options of the evaluation by their short names (`tasks=[arc_easy]`, `judge.model=NAME`) as overrides of it."""
    own = {item.name for item in fields(Evaluate)} - {item.name for item in fields(RunOptions)} - {"init", "reward"}
    words = [f"judge_{word.removeprefix('judge.')}" if word.startswith("judge.") else word for word in words]
    return [f"stages.evaluate.{word}" if word.split("=")[0].split(".")[0] in own else word for word in words]


def _given(overrides: list[str], key: str) -> str | None:
    return next((word.split("=", 1)[1] for word in overrides if word.startswith(f"{key}=")), None)


def _plain(model: str, init: str) -> list[str]:
    """The words of an evaluation of a model, or of an adapter on it, that has no record."""
    return ["pipeline=evaluate", f"stages.evaluate.init={init}", "model=hf", f"model.path={model}"]


def _of_checkpoint(checkpoint: Checkpoint, base: str | None, overrides: list[str]) -> RunConfig:
    """The evaluation of a checkpoint by its chain's reward model, on its base where that lies now."""
    scores = checkpoint.role == "reward"  # it is measured itself, with the policy that it stands on
    speaker = checkpoint.parent("init") if scores else checkpoint
    words = ["pipeline=evaluate", f"stages.evaluate.init={speaker.folder.resolve() if speaker else 'base'}"]
    if not any(word.startswith("model") for word in overrides):
        checkpoint.base_folder(base)  # one line, if it is not there
    if base:
        words += ["model=hf", f"model.path={base}"]
    judge = checkpoint if scores else checkpoint.parent("reward")
    if judge is not None:
        words.append(f"stages.evaluate.reward={judge.folder.resolve()}")
    return _as_recorded(compose([*words, *overrides]), checkpoint, base, overrides)


def recorded_recipe(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The resolved recipe of the run that a checkpoint comes from, if it still stands beside it."""
    recipe = run_of(checkpoint.folder) / "recipe.yaml"
    return yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else None


def recorded_data(recipe: dict[str, Any], stage: str) -> dict[str, Any] | None:
    """The data that a recipe evaluates with, or else that of a stage."""
    stages: dict[str, Any] = recipe["stages"]
    return stages.get("evaluate", stages.get(stage, {})).get("data")  # type: ignore[no-any-return]


def _as_recorded(config: RunConfig, checkpoint: Checkpoint, base: str | None, overrides: list[str]) -> RunConfig:
    """The evaluation with the model and data that the checkpoint's run recorded, unless they are overridden."""
    recorded = recorded_recipe(checkpoint)
    if recorded is None:
        return config
    data = recorded_data(recorded, checkpoint.stage)
    given = {word.split("=", 1)[0].lstrip("+") for word in overrides}
    spec, resolved = config.stages[-1], deepcopy(config.resolved)
    if not any(word.split(".")[0] == "model" for word in given):
        model = recorded["model"]
        if base or model.get("init"):  # it has moved, or was made in the run
            found = str(bare(checkpoint.base_folder(base)))
            model = {**model, "path": found, "revision": None, "init": None, "config": {}, "tokenizer": {}}
        resolved["model"] = model
        config = replace(config, model=build(ModelOptions, model, "model"))
    if data and not any(word.split(".")[0] == "data" or word.startswith("stages.evaluate.data") for word in given):
        resolved["stages"][spec.name]["data"] = data
        config = replace(config, stages=[replace(spec, data=build(DataOptions, data, "data"))])
    return replace(config, resolved=resolved)
