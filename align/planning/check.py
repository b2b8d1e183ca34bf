"""What `align check` finds out about a run: everything that `align run` would refuse, and what it would do.

Nothing is trained and no weight is loaded. Every rule is the run's own: sources, chain and settings come from
`align/planning/preflight.py`, rows from `align/training/data.py`, counts from the adapters. Here problems are
collected, not raised.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.checkpoints.compatibility import Input, StagePlan
from align.config.schema import RunConfig, StageSpec
from align.models.fingerprint import context_length, read_model_config
from align.planning.findings import Findings
from align.planning.preflight import base_notes, plan_stages, source_problems, unfit, unknown_tokens
from align.stages.base import TrainingStage
from align.training.data import reading_of
from data_prep.core.errors import UserError, said_by

if TYPE_CHECKING:
    from align.planning.rows import Shelf
    from data_prep.prepare.prepare import Renderer


def check(config: RunConfig, say: Callable[[str], None] = lambda doing: None, shelf: Shelf | None = None) -> Findings:
    """Everything about a run that can be known without training.

    Args:
        config: the run.
        say: is told what is being done, for a progress line.
        shelf: takes the findings and the rows that are read, for whoever needs them afterwards.
    """
    from align.planning.rows import Shelf

    shelf = shelf or Shelf(Findings())
    found = shelf.found
    for stage, problem in source_problems(config):
        found.add(stage, [problem])
    with tempfile.TemporaryDirectory(prefix="align-check-") as scratch:
        folder = _base(config, Path(scratch), found, say)
        say("checking the chain")
        plans = plan_stages(config, folder)
        _settings(config, plans, found)
        if folder is not None:
            _content(config, plans, folder, shelf, say)
    return found


def _base(config: RunConfig, scratch: Path, found: Findings, say: Callable[[str], None]) -> Path | None:
    """The base's folder with a config.json and tokenizer; its weights are looked at, not loaded."""
    from align.models.resolve import find_base

    say("opening the model folder")
    try:
        folder = find_base(config, scratch, weights=False)
        read_model_config(folder)
        if config.model.init is None:
            notes = [UserError(note, file=str(folder), code="renamed") for note in base_notes(folder)]
            found.add(None, notes, "warning")
    except UserError as problem:
        found.add(None, [problem])
        return None
    return folder


def _settings(config: RunConfig, plans: list[StagePlan[Input]], found: Findings) -> None:
    """Problems of the chain and of every stage's settings."""
    fresh = config.model.init is not None
    for plan in plans:
        spec, where = plan.spec, f"stages.{plan.spec.name}"
        found.add(spec.name, plan.problems)
        if not fresh:  # weights from nothing take other learning rates, and have nothing to lose
            found.add(spec.name, spec.stage.doubts(where, spec.adapter, config.model.lr_scale), "warning")


def _content(
    config: RunConfig, plans: list[StagePlan[Input]], folder: Path, shelf: Shelf, say: Callable[[str], None]
) -> None:
    """What needs the tokenizer and the architecture: rows, counts, steps."""
    found = shelf.found
    say("loading the tokenizer")
    model_config = read_model_config(folder)
    renderer = _renderer(folder, found)
    notes = dict(renderer.choices) if renderer else {}
    found.model = {
        "name": config.model.name,
        "path": config.model.path,
        "type": model_config.get("model_type"),
        "context": context_length(model_config),
        "notes": notes,
    }
    for plan in plans:
        spec = plan.spec
        found.add(spec.name, unknown_tokens(spec, folder) if renderer else [])
        trained = _read(config, plan, model_config, renderer, shelf, say) if renderer else None
        say(f"counting parameters of {spec.name}")
        found.stages.append(_summary(config, plan, model_config, trained, found))
    found.model["notes"].update(renderer.choices if renderer else {})


def _renderer(folder: Path, found: Findings) -> Renderer | None:
    from align.models.resolve import open_renderer

    try:
        return open_renderer(folder)
    except UserError as problem:
        found.add(None, [problem])
        return None


def _read(
    config: RunConfig,
    plan: StagePlan[Input],
    model_config: dict[str, Any],
    renderer: Renderer,
    shelf: Shelf,
    say: Callable[[str], None],
) -> int | None:
    """Read all data of a stage; returns its number of training rows, if it could be read."""
    from align.planning.rows import kinds_of

    reading = reading_of(plan, model_config, renderer, config.seed)
    counts = []
    for kind in kinds_of(plan.spec):
        say(f"reading {kind} of {plan.spec.name}")
        counts.append(shelf.read(reading, kind))
    return counts[0] if counts else None


def _summary(
    config: RunConfig, plan: StagePlan[Input], model_config: dict[str, Any], rows: int | None, found: Findings
) -> dict[str, Any]:
    """What one stage would do: what it stands on, what it trains, at which rate, in how many steps."""
    spec, mode = plan.spec, plan.parent_mode
    summary: dict[str, Any] = {
        "name": spec.name,
        "stage": spec.stage.name,
        "init": plan.init.label if plan.init else "base",
        "reward": ", ".join(judge.label for judge in plan.judges) or None,
        "on_parent": mode.mode.name if mode and mode.mode else None,
        "load": mode.load.value if mode else None,
        "forced": list(mode.forced) if mode else [],
        "rows": rows,
    }
    if isinstance(spec.stage, TrainingStage):
        summary |= _training(config, spec, model_config, rows, found)
    return summary


def _training(
    config: RunConfig, spec: StageSpec, model_config: dict[str, Any], rows: int | None, found: Findings
) -> dict[str, Any]:
    """The numbers of a stage that trains."""
    stage = spec.stage
    numbers: dict[str, Any] = {"adapter": spec.adapter.method, "lr": stage.peak_lr(spec.adapter, config.model.lr_scale)}
    try:
        problems = unfit(spec, model_config)
        found.add(spec.name, problems)
        if not problems:
            counts = spec.adapter.count(model_config)
            share = counts.trainable / counts.total
            numbers |= {"trainable": counts.trainable, "total": counts.total, "share": share}
    except UserError as problem:
        found.add(spec.name, [problem])
    except (ValueError, KeyError, AttributeError, TypeError) as problem:
        kind, reason = model_config.get("model_type"), said_by(problem)
        found.add(None, [UserError(f"architecture {kind} is not supported here ({reason})", code="architecture")])
    numbers |= stage.plan_over(rows) if rows is not None else {}
    return numbers
