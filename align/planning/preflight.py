"""What can be found wrong with a run before any weight loads: its sources, its settings, and its chain.

Everything here collects problems. `align run` raises the first of them, `align check` prints them all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from align.adapters.shapes import require_decoder
from align.adapters.token_rows import ids_of
from align.checkpoints.checkpoint import Checkpoint
from align.checkpoints.compatibility import (
    Input,
    ParentMode,
    Planned,
    StagePlan,
    adapter_name,
    check_agreement,
    check_reward,
    choose_parent_mode,
    find_input,
    load_of,
    lookout,
    options_of,
)
from align.config.schema import OnParent, RunConfig, Shard, StageSpec
from align.models.fingerprint import check_weight_files, read_model_config, state_of
from align.models.quantised import require_kept
from align.models.tokenizer import open_tokenizer
from align.tracking.trackers.base import check_packages
from data_prep.core.cache_folder import Remembered
from data_prep.core.errors import UserError
from data_prep.core.hashing import sha256_json
from data_prep.records.mixing import sources_for
from data_prep.records.stream import check_options, open_stream, source_for
from data_prep.sources.files import find_files, is_hub_id, resolve
from data_prep.types import RowKind


def check_sources(config: RunConfig) -> None:
    """Every stage has a source for every kind of row it reads, and every named file exists.

    Raises:
        UserError: a later stage would have failed after the earlier ones had been trained.
    """
    for _, problem in source_problems(config):
        raise problem
    for spec in config.stages:
        for kind in spec.stage.reads:
            _check_first_rows(spec, RowKind[kind], config.seed)


def _check_first_rows(spec: StageSpec, kind: RowKind, seed: int) -> None:
    """The first rows of every file are good ones of a format that the stage reads, and leave nothing out."""
    for one in sources_for(spec.data, kind):
        if one.given.source.path and not one.given.remote:
            open_stream(one.given, kind, seed).check_first()


def source_problems(config: RunConfig) -> Iterator[tuple[str | None, UserError]]:
    """(stage, problem) of data that is missing, or given and never read; each problem once."""
    said: set[str] = set()
    for spec in config.stages:
        checks = [lambda s=spec, k=kind: _check_source(s, k) for kind in spec.stage.reads]
        problems = [found for check in checks for found in caught(check)]
        problems += caught(partial(check_code, spec, config.allow_code)) or spec.stage.data_refusals(spec.data)
        for problem in problems:
            if str(problem) not in said:
                said.add(str(problem))
                yield spec.name, problem
    whole = (
        lambda: _check_out(Path(config.out).expanduser().resolve() / config.name),
        lambda: _check_path_is_read(config.stages),
        lambda: check_packages(config.tracking.to),
    )
    for check in whole:
        yield from ((None, problem) for problem in caught(check))


def _check_out(folder: Path) -> None:
    """The folder of the run is there, or can be made."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        said = "is a file, where the run's folder is to be"
    elif not os.access(there, os.W_OK | os.X_OK):
        said = "cannot be written to"
    else:
        return
    raise UserError(said, code="output", file=str(there), hint="name another folder: out=FOLDER")


def check_code(spec: StageSpec, allowed: bool) -> None:
    """Functions of the user run only where the run allows it; nothing of them is imported before."""
    for signal in spec.stage.judged_by(spec.data):
        signal.source.require_allowed(signal.where, allowed)
    spec.stage.require_allowed(f"stages.{spec.name}", allowed)


def caught(check: Callable[[], object]) -> list[UserError]:
    """The problem that `check` raises, if it does."""
    try:
        check()
    except UserError as problem:
        return [problem]
    return []


def _check_source(spec: StageSpec, kind: str) -> None:
    for one in sources_for(spec.data, RowKind[kind]):
        for path in (one.given.source.path, one.given.source.eval_path):
            _check_file(path, spec.data.root)
        check_options(one.given, RowKind[kind])


def _check_file(path: str | None, root: str | None) -> None:
    """The files of a path are there; a hub id is looked up when it is read."""
    if path is None:
        return
    place = resolve(path, root)
    try:
        find_files(place)
    except UserError:
        if not is_hub_id(path):
            raise


def _check_path_is_read(specs: Sequence[StageSpec]) -> None:
    """`data.path` serves the kinds without a source of their own; where there are none it would be ignored."""
    reading = [spec for spec in specs if spec.data.path and _reads_path(spec)]
    idle = [spec for spec in specs if spec.data.path and spec.stage.reads and spec not in reading]
    own = [spec for spec in idle if spec.data.path not in {other.data.path for other in reading}]
    if own:
        raise UserError(
            f"is not read: the data '{own[0].data.name}' brings its own {' and '.join(own[0].stage.reads)}",
            field=f"stages.{own[0].name}.data.path",
            hint=f"data=files data.path={own[0].data.path}",
            code="not_read",
        )


def _reads_path(spec: StageSpec) -> bool:
    """Whether a stage gets a kind of row from `data.path`; a source that is wrong in itself is not said twice."""
    try:
        paths = {source_for(spec.data, RowKind[kind]).source.path for kind in spec.stage.reads}
    except UserError:
        return True
    return spec.data.path in paths


def plan_stages(config: RunConfig, base_folder: Path | None) -> list[StagePlan[Input]]:
    """What every stage will stand on, with its problems, before any of them has been trained.

    Args:
        base_folder: the base that finished checkpoints must have been trained on; None: not known yet.
    """
    before: dict[str, Planned] = {}
    plans = []
    for spec in config.stages:
        plan = _plan(config, spec, before, base_folder)
        plans.append(plan)
        if spec.stage.makes is not None:
            load = plan.parent_mode.load if plan.parent_mode else load_of(plan.init, spec.adapter, config.model.load)
            method, options = adapter_name(spec.adapter), options_of(spec.adapter)
            critic = spec.stage.leaves_critic
            before[spec.name] = Planned(spec.name, spec.stage.makes, method, options, load.value, critic)
    return plans


def require_plans(config: RunConfig, base_folder: Path | None) -> list[StagePlan[Input]]:
    """The plans of all stages; what a later one would be refused for is refused before the first is trained.

    Raises:
        UserError: the first problem of the chain.
    """
    if base_folder is not None and config.model.init is None:
        base_notes(base_folder)
    plans = plan_stages(config, base_folder)
    for plan in plans:
        plan.require()
        if plan.spec.stage.makes is not None and base_folder is not None:
            for problem in unfit(plan.spec, read_model_config(base_folder)) or unknown_tokens(plan.spec, base_folder):
                raise problem
    return plans


def _plan(
    config: RunConfig, spec: StageSpec, before: Mapping[str, Planned], base_folder: Path | None
) -> StagePlan[Input]:
    """What a stage stands on, checked: inputs, their files and base, parent mode, reward model, settings."""
    stage, problems = spec.stage, list[UserError]()
    names = [each.name for each in config.stages]
    inputs: list[Input | None] = []
    asked = [(stage.init, "policy"), (stage.reward_model, "reward"), *((name, "reward") for name in stage.ensemble)]
    for wanted, role in asked:
        found = None
        try:
            found = find_input(wanted, role, before, names, config.out)
            if isinstance(found, Checkpoint) and base_folder is not None:
                found = found.require(base_folder, config.model_names)
        except UserError as problem:
            problems.append(problem)
        inputs.append(found)
    init, reward, *more = inputs
    judges = [judge for judge in (reward, *more) if judge is not None]
    mode = None
    if not problems:
        try:
            if stage.makes is None:
                mode = lookout(init, config.model.load, config.on_precision_change)
            else:
                below = stage.stands_on(init, reward)
                mode = choose_parent_mode(
                    below, spec.adapter, stage.on_parent, config.model.load, config.on_precision_change
                )
        except UserError as problem:
            problems.append(problem)
        load = load_of(init, spec.adapter, config.model.load)
        if mode is not None and base_folder is not None:
            problems += caught(lambda: require_kept(read_model_config(base_folder), mode.load))
        problems += caught(lambda: check_reward(spec, judges, load, config.on_precision_change))
        if stage.makes is not None:
            problems += caught(lambda: check_agreement(spec.adapter, (init, *judges)))
        problems += stage.parent_refusals(f"stages.{spec.name}", init)
    problems += stage.refusals(f"stages.{spec.name}", spec.adapter, reward)
    if config.distributed.shard is not Shard.none:
        problems += against_parts(spec, mode, config.distributed.shard)
    return StagePlan(spec, init, reward, mode, problems, judges[1:])


def against_parts(spec: StageSpec, mode: ParentMode | None, shard: Shard) -> Iterator[UserError]:
    """What needs all of a base in every process, or all of what is trained."""
    trains_weights = spec.stage.trains and spec.adapter.traits.owns_weights
    if trains_weights and shard is Shard.base:
        yield UserError(
            f"{adapter_name(spec.adapter)} trains a copy of all weights, which each process of {spec.name} would hold",
            field="distributed.shard",
            code="whole_base",
            hint="set distributed.shard=full, which cuts that copy too, or take an adapter",
        )
    if spec.stage.trains and shard is Shard.full and spec.stage.optimizer.rounds_in_blocks:
        yield UserError(
            f"{spec.stage.optimizer.value} rounds moments in blocks, which parts of a weight cut otherwise",
            field=f"stages.{spec.name}.optimizer",
            code="blocks_in_parts",
            hint="set it to adamw, whose moments are cut with the weights, or distributed.shard=base for an adapter",
        )
    if mode is not None and mode.mode is OnParent.merge:
        yield UserError(
            f"on_parent=merge makes a copy of all weights, which each process of {spec.name} would hold",
            field="distributed.shard",
            code="whole_base",
            hint=f"set distributed.shard=none or stages.{spec.name}.on_parent=stack, or merge before: align merge",
        )


def base_notes(folder: Path) -> list[str]:
    """What must be said of a base's weights, known from their headers.

    Raises:
        UserError: it is none that can be trained here, or its tensors are not those of its architecture.
    """
    config = read_model_config(folder)
    check_weight_files(folder)
    require_decoder(config)
    key, known = sha256_json([state_of(folder), version("transformers")]), Remembered("bases.json")
    notes: list[str] | None = known.get(key)
    if notes is None:
        from align.models.loading import inspect_weights

        known.put(key, notes := inspect_weights(folder))
    return notes


def unknown_tokens(spec: StageSpec, folder: Path) -> list[UserError]:
    """A token that a training stage's adapter names and the tokenizer of a model folder does not have."""
    named = spec.adapter.named_tokens if spec.stage.trains else []
    return caught(lambda: ids_of(open_tokenizer(folder), named)) if named else []


def unfit(spec: StageSpec, model_config: dict[str, Any]) -> list[UserError]:
    """What is wrong with a training stage's adapter on the model, before any weight loads.

    Raises:
        UserError: the model is none that can be trained here.
    """
    require_decoder(model_config)
    problems: list[UserError] = spec.adapter.check(model_config)
    if not problems and not spec.stage.has_head and not spec.adapter.count(model_config).trainable:
        said = "nothing to train: the adapter leaves no trainable parameter"
        problems = [UserError(said, field=f"stages.{spec.name}.adapter", code="nothing_to_train")]
    return problems
