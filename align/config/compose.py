"""Recipes and overrides in, one checked `RunConfig` out. Everything a run does is decided here; no torch.

Hydra puts the YAML recipes together, every stage gets its own complete adapter and data options, and the result
becomes the registered dataclasses. See `align/config/overrides.py` for the forms that overrides may take.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hydra.core.override_parser.types import Override

from align.config.foreign_names import answered
from align.config.growth import grown
from align.config.hydra_loader import Composition, compose_choices, group_choices, preset, recipes, resolved
from align.config.origins import located, origins, told_origins
from align.config.overrides import GROUPS, NAMES, Landscape, first_choice, is_group, parse, rewrite
from align.config.registries import adapters, stages, trackers
from align.config.safe_values import check_plain
from align.config.schema import DistributedOptions, ModelOptions, RunConfig, RunOptions, StageSpec, TrackingOptions
from data_prep.core.errors import UserError, unknown
from data_prep.core.hashing import sha256_json
from data_prep.core.options import build, convert, option_types, plain, unknown_key
from data_prep.options import DataOptions

Tree = dict[str, Any]
SCALARS = ("seed", "out", "name", "on_precision_change", "reward_gate", "allow_code", "deterministic")
"""Top-level keys that are one value."""
NOT_IN_DIGEST = ("out", "name", "tracking", "reward_gate", "allow_code", "distributed")
"""Top-level keys that change no result, and so neither a run's name."""
_LONGEST_NAME = 200
"""Bytes of a run's name; files beside its folder have longer ones, and file systems take 255."""


def compose(overrides: Sequence[str], config_dir: str | None = None) -> RunConfig:
    """The run that the recipes and `overrides` describe.

        config = align.compose(["pipeline=rlhf", "adapter=vera", "stages.ppo.adapter=lora"])
        assert [spec.name for spec in config.stages] == ["sft", "reward_model", "ppo", "evaluate"]

    Args:
        overrides: Hydra overrides in the forms of `align/config/overrides.py`.
        config_dir: a folder of the user's own groups (`data/mine.yaml`, `experiment/mine.yaml`).

    Raises:
        UserError: anything unknown or of the wrong type: one line with the nearest valid name.
    """
    given = parse(overrides)
    for override in given:
        if override.is_sweep_override():
            raise UserError(
                f"'{override.input_line}' sweeps over several values", hint="align run takes them with -m", code="sweep"
            )
    with recipes(config_dir):
        return _composed(given, [*overrides, *(["--config-dir", config_dir] if config_dir else [])])


def _composed(given: Sequence[Override], words: list[str]) -> RunConfig:
    """The run of parsed overrides (inside `recipes`); `words` are the command's."""
    known: dict[str, type] = {}
    with located(given), answered(known):
        composition, land = survey(given)
        known |= land.stages
        composition.change(rewrite([item for item in given if not is_group(item)], land))
        tree = composition.content()
        kinds = _stage_kinds(tree, composition.choices)
        _check_reach(tree, kinds, given)
        _check_use(tree, kinds)
        for name, node in tree["stages"].items():
            for group in NAMES:
                node[group] = _own_options(tree, node, group, f"stages.{name}")
        check_plain(tree)
        config = _checked(resolved(tree), kinds, composition.choices, ["align", "run", *words])
        return replace(config, swept=composition.swept, repeats=composition.repeats)


def explain(overrides: Sequence[str], config_dir: str | None = None) -> tuple[RunConfig, dict[str, str]]:
    """The run, and where each of its values comes from: option -> file and line, command line, or default."""
    config = compose(overrides, config_dir)
    with recipes(config_dir):
        return config, told_origins(config, origins(parse(overrides)))


def survey(given: Sequence[Override]) -> tuple[Composition, Landscape]:
    """The recipes that the group choices among the overrides compose, and what other overrides may name in them.

    Called inside `recipes`. A sweep over choices is surveyed at its first value.
    """
    groups = {group: group_choices(group) for group in GROUPS}
    chosen = [item for item in given if is_group(item)]
    rewrite(chosen, Landscape(groups=groups, stages={}))
    composition = compose_choices("config", [first_choice(item) for item in chosen])
    tree = composition.content()
    kinds = _stage_kinds(tree, composition.choices)
    for name, node in tree["stages"].items():
        for group, key in NAMES.items():
            if isinstance(node.get(group), str):
                raise UserError(
                    f"a recipe names it as {{{key}: {node[group]}}}", field=f"stages.{name}.{group}", code="bad_recipe"
                )
    land = Landscape(groups=groups, stages=kinds)
    chain = grown(composition, land, given)
    if len(chain) > len(kinds):
        composition.lengthen({name: (link.kind.name, link.options) for name, link in chain.items()})
        composition.repeats = {name: link.repeats for name, link in chain.items() if link.repeats}
        land = Landscape(groups=groups, stages={name: link.kind for name, link in chain.items()})
    return composition, land


def _stage_kinds(tree: Tree, choices: Mapping[str, Any]) -> dict[str, Any]:
    """Stage name -> its dataclass: what the recipe chose for it, else the stage of the same name.

    Raises:
        UserError: no stages, a stage that is not a mapping, options of one that the pipeline lacks, or a recipe file
            without its package line.
    """
    for group in ("pipeline", "experiment"):
        if group in tree:
            raise UserError(
                f"the recipe {group}/{choices.get(group)}.yaml must begin with the line '# @package _global_'",
                code="bad_recipe",
            )
    nodes = tree.get("stages")
    if not isinstance(nodes, dict) or not nodes:
        raise UserError("the pipeline has no stage", field="stages", code="bad_recipe")
    kinds: dict[str, Any] = {}
    for name in list(nodes):
        nodes[name] = {} if nodes[name] is None else nodes[name]
        if not isinstance(nodes[name], dict):
            raise UserError("a stage is a mapping of options", field=f"stages.{name}", code="bad_value")
        chosen = choices.get(f"stage@stages.{name}")
        if chosen is None and any(f"stage@stages.{each}" in choices for each in nodes):
            raise UserError(
                f"a recipe sets options of a stage '{name}', which the pipeline does not have",
                field=f"stages.{name}",
                code="no_stage",
                hint="take a pipeline with it and leave out others ('~stages.OTHER'), or add to the recipe's defaults: "
                f"/stage@stages.{name}: KIND",
            )
        kinds[name] = stages.get(str(chosen or name))
    return kinds


def follows(node: Tree, group: str) -> bool:
    """Whether a stage takes the run's adapter (or data), perhaps with some options changed."""
    own = node.get(group)
    return own is None or (isinstance(own, dict) and NAMES[group] not in own)


def _check_reach(tree: Tree, kinds: Mapping[str, Any], given: Sequence[Override]) -> None:
    """Refuse `adapter.rank=8` (or `data.path=x`) that would reach no stage at all."""
    for override in given:
        group, _, tail = override.key_or_group.partition(".")
        if group not in NAMES or not tail or override.package is not None:
            continue
        takers = [name for name, kind in kinds.items() if group == "data" or kind.trains]
        if any(follows(tree["stages"][name], group) for name in takers):
            continue
        why = "every stage has its own" if takers else "no stage of this pipeline trains one"
        hint = f"set stages.{takers[0]}.{group}.{tail}" if takers else None
        raise UserError(f"reaches no stage: {why}", field=override.key_or_group, hint=hint, code="reaches_no_stage")


def _check_use(tree: Tree, kinds: Mapping[str, Any]) -> None:
    """Refuse an adapter or a reward model for a stage that would never look at it."""
    for name, kind in kinds.items():
        node = tree["stages"][name]
        if node.get("adapter") is not None and not kind.trains:
            raise UserError(f"{name} trains no adapter", field=f"stages.{name}.adapter", code="not_used")
        if node.get("reward") is not None and not kind.needs_reward:
            raise UserError(f"{name} takes no reward model", field=f"stages.{name}.reward", code="not_used")


def _own_options(tree: Tree, node: Tree, group: str, where: str) -> Tree:
    """A stage's complete options of `group`: the run's, or a preset's, with the stage's changes on top."""
    own = node.get(group)
    if own is not None and not isinstance(own, dict):
        raise UserError(f"expected a name or a mapping (got {own})", field=f"{where}.{group}", code="bad_value")
    key = NAMES[group]
    base = tree[group] if follows(node, group) else preset(group, str((own or {})[key]), where)
    return merged(base, {name: value for name, value in (own or {}).items() if name != key})


def merged(base: Tree, changes: Tree) -> Tree:
    """`base` with `changes` on top, mapping by mapping; neither is changed."""
    result = dict(base)
    for key, value in changes.items():
        held = result.get(key)
        result[key] = merged(held, value) if isinstance(held, dict) and isinstance(value, dict) else value
    return {key: merged(value, {}) if isinstance(value, dict) else value for key, value in result.items()}


def _checked(tree: Tree, kinds: Mapping[str, Any], choices: Mapping[str, Any], command: list[str]) -> RunConfig:
    """The typed run of a resolved tree; every unknown key and wrong type is found here."""
    top = option_types(RunOptions)
    for key in tree:
        if key not in top:
            raise unknown_key(key, top)
    scalars = {key: convert(top[key], tree.get(key, getattr(RunOptions(), key)), key) for key in SCALARS}
    if scalars["seed"] < 0:
        raise UserError(f"out of range (got {scalars['seed']}; expected at least 0)", field="seed", code="bad_value")
    if not scalars["out"].strip():
        raise UserError("needs a folder", field="out", code="bad_value")
    model = build(ModelOptions, tree.get("model"), "model")
    build_adapter(tree.get("adapter"), "adapter")
    build(DataOptions, tree.get("data"), "data")
    specs = [_stage_spec(name, kind, tree["stages"][name]) for name, kind in kinds.items()]
    tracking = build(TrackingOptions, tree.get("tracking"), "tracking")
    for one in tracking.to:
        if one not in trackers.names():
            raise UserError(unknown("tracker", one, trackers.names()).message, field="tracking.to", code="unknown_name")
    distributed = build(DistributedOptions, tree.get("distributed"), "distributed")
    content: Tree = {
        "pipeline": str(choices.get("pipeline")),
        **plain(scalars),
        "tracking": plain(tracking),
        "distributed": plain(distributed),
        "model": plain(model),
        "stages": {spec.name: _shown_stage(spec) for spec in specs},
    }
    digest = sha256_json({key: value for key, value in content.items() if key not in NOT_IN_DIGEST})
    name = content["name"] = checked_name(scalars["name"] or f"{content['pipeline']}-{digest[:8]}")
    return RunConfig(
        pipeline=content["pipeline"],
        seed=scalars["seed"],
        out=scalars["out"],
        name=name,
        model=model,
        tracking=tracking,
        distributed=distributed,
        on_precision_change=scalars["on_precision_change"],
        reward_gate=scalars["reward_gate"],
        allow_code=scalars["allow_code"],
        deterministic=scalars["deterministic"],
        stages=specs,
        resolved=content,
        digest=digest,
        command=command,
    )


def _stage_spec(name: str, kind: type, node: Tree) -> StageSpec:
    """A stage's dataclasses from its complete node."""
    where = f"stages.{name}"
    own = {key: value for key, value in node.items() if key not in NAMES}
    return StageSpec(
        name=name,
        stage=build(kind, own, where),
        adapter=build_adapter(node["adapter"], f"{where}.adapter"),
        data=build(DataOptions, node["data"], f"{where}.data"),
    )


def build_adapter(node: Any, where: str) -> Any:
    """An instance of the adapter that `node["method"]` names.

    Raises:
        UserError: no method, an unknown one, or an option the method does not have.
    """
    if not isinstance(node, dict) or not node.get("method"):
        raise UserError("the adapter names no method", field=where, code="bad_recipe")
    return build(adapters.get(str(node["method"])), node, where)


def _shown_stage(spec: StageSpec) -> Tree:
    """A stage as `recipe.yaml` shows it."""
    options = {key: value for key, value in plain(spec.stage).items() if key not in NAMES}
    return {"stage": spec.stage.name, **options, "adapter": plain(spec.adapter), "data": plain(spec.data)}


def checked_name(name: str) -> str:
    """`name` if it can be the name of one folder.

    Raises:
        UserError: it is empty, begins as a flag does, has a slash in it, is `.` or `..`, or is too long.
    """
    if (
        not name.strip(". ")
        or name.startswith("-")
        or any(mark in name for mark in "/\\\0\n")
        or len(os.fsencode(name)) > _LONGEST_NAME
    ):
        raise UserError(f"'{name}' is not the name of one folder", field="name", code="bad_value")
    return name
