"""`align count`: parameters and bytes of a method on any `config.json`, by closed form, without weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.adapters.shapes import config_of
from align.config.compose import compose
from align.models.fingerprint import read_model_config
from align.models.location import model_folder
from align.stages.base import TrainingStage
from data_prep.core.errors import UserError

_KEY = "model.config="


def count(words: Sequence[str], config_dir: str | None = None) -> dict[str, Any]:
    """Counts of every training stage's adapter.

    Args:
        words: overrides of a run; `model.config=PATH` (a config.json, or a folder with one) needs no weights.
        config_dir: a folder of the user's own recipes.

    Returns:
        Of the first stage: method, trainable, frozen, head, total, share, adapter_bytes; and `stages`: the same for
        every stage. `trainable` and `share` exclude the head; `total` is base and adapter; bytes are float32.
    """
    given = [word for word in words if word.startswith(_KEY) and not word.startswith(f"{_KEY}{{")]
    rest = [word for word in words if word not in given]
    if not any(word.startswith("pipeline=") or word.startswith("experiment=") for word in rest):
        rest.append("pipeline=sft")
    config = compose(rest, config_dir)
    model = _model_config(given[-1].removeprefix(_KEY) if given else None, config.model)
    stages = {spec.name: _of(spec, model) for spec in config.stages if isinstance(spec.stage, TrainingStage)}
    if not stages:
        raise UserError(f"pipeline {config.pipeline} trains nothing that could be counted", code="nothing_to_count")
    return {**next(iter(stages.values())), "model": model.get("model_type"), "stages": stages}


def _model_config(path: str | None, options: Any) -> dict[str, Any]:
    if path is not None:
        place = Path(path).expanduser()
        return read_model_config(place.parent if place.is_file() and place.name == "config.json" else place)
    if options.config:
        return dict(options.config)
    if not options.path:
        raise UserError("no model is given", field="model.config", hint="set model.config=PATH of a config.json")
    return read_model_config(model_folder(options.path, options.revision))


def _of(spec: Any, model: dict[str, Any]) -> dict[str, Any]:
    for problem in spec.adapter.check(model):
        if problem.code != "not_supported":  # what cannot be trained here can still be counted
            raise problem
    counts = spec.adapter.count(model)
    saved = counts.trainable if counts.saved is None else counts.saved
    head = config_of(model).hidden_size + 1 if spec.stage.has_head else 0
    return {
        "method": spec.adapter.method,
        "trainable": counts.trainable,
        "frozen": counts.frozen,
        "head": head,
        "total": counts.total,
        "share": counts.trainable / counts.total,
        "adapter_bytes": 4 * saved,
    }
