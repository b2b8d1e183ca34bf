"""`align run -m`: every combination of the values given with commas, by Hydra's own sweepers and launchers.

Jobs land in OUT/NAME/jobs/<i>/ as ordinary runs. All combinations are composed before the first job starts, so that a
typing error costs nothing, and so that it is known which stages jobs have in common: each of these is trained once, in
OUT/NAME/shared/. A job that fails does not stop the others; the same command again runs only what is not finished.

    sweep.py          what the jobs are; handing them to Hydra
    sweep_job.py      one job, in whatever process a launcher starts it
    sweep_record.py   sweep.json and the tables, from what the jobs left on disk
    sweep_report.py   report.html
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from align.config.compose import compose, survey
from align.config.hydra_loader import combinations, group_choices, recipes, recipes_place
from align.config.overrides import parse, rewrite
from align.config.schema import RunConfig
from align.planning.preflight import check_sources
from align.runs.folder import locked
from align.sweeps.job import job, quoted, typed_form
from align.sweeps.record import begin, bring_up_to_date, finish
from data_prep.core.errors import UserError
from data_prep.core.hashing import sha256_json

PLACE = ("out", "name")
QUIET = ["hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.job.chdir=false"]


@dataclass(frozen=True)
class Plan:
    """What a sweep is going to run."""

    first: RunConfig
    jobs: list[list[str]]
    """The overrides of each job, by number; empty where a sweeper of Hydra's decides as it goes."""
    shared: list[dict[str, Any]]
    """Stages that several jobs have in common: stage, key, used_by."""


def sweep(overrides: Sequence[str], config_dir: str | None) -> tuple[int, dict[str, Any]]:
    """Run all jobs that are not finished; returns (exit code of the first job that failed, content of sweep.json).

    Raises:
        UserError: a mistake in any combination, before the first job starts; or another process is at work here.
        KeyboardInterrupt: interrupted; sweep.json says how far it got.
    """
    given = parse(overrides, sweeps=True)
    _check(given)
    with recipes(config_dir):
        _check_plugins(given)
        given, words = _with_lists_of_the_recipe(given)
    plan = plan_of(words, config_dir)
    swept = [word for word in words if not _is_place(word)]
    named = any(item.key_or_group == "name" for item in given)
    own = [word for word in swept if not word.lstrip("+").startswith(("hydra", "tracking."))]
    folder = (
        Path(plan.first.out).expanduser() / (plan.first.name if named else f"{plan.first.pipeline}-{_digest(own)}")
    ).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    command = ["align", "run", "-m", *overrides, *(["--config-dir", config_dir] if config_dir else [])]
    with locked(folder):
        begin(folder, plan.jobs, plan.shared, command, config_dir)
        print(f"sweep {folder}: {_counted(plan)}", file=sys.stderr)
        interrupted = True
        try:
            own_lists = [] if not plan.jobs else ["hydra.sweeper.params=null"]  # they are among the words
            _launch([*swept, *own_lists, *_parallel(given, len(plan.jobs))], folder, config_dir)
            interrupted = False
        finally:
            (folder / "multirun.yaml").unlink(missing_ok=True)  # Hydra's; sweep.json says the same
            finish(folder, interrupted)
        return bring_up_to_date(folder)


def _with_lists_of_the_recipe(given: Sequence[Override]) -> tuple[list[Override], list[str]]:
    """The overrides with those lists that the recipe brings and nobody replaced; and all in Hydra's form."""
    composition, land = survey([item for item in given if not _is_hydra(item)])
    every = list(given)
    if not any(item.key_or_group == "hydra/sweeper" for item in given):
        named = {item.key_or_group for item in given}
        every += parse(
            [f"{key}={values}" for key, values in composition.swept.items() if key not in named], sweeps=True
        )
    if len(every) > len(given):  # among them may be an adapter for every stage
        land = survey([item for item in every if not _is_hydra(item)])[1]
    return every, rewrite(every, land)


def _check(given: Sequence[Override]) -> None:
    """Refuse a sweep over the folder, without values, or with a launcher that is not installed."""
    chooses = any(item.key_or_group == "hydra/sweeper" for item in given)
    for item in given:
        if item.is_sweep_override() and not item.is_discrete_sweep() and not chooses:
            raise UserError(
                f"'{item.input_line}' has no list of values",
                field=item.key_or_group,
                hint="give them with commas",
                code="sweep",
            )
        if item.key_or_group in PLACE and item.is_sweep_override():
            raise UserError("cannot be swept: all jobs share one folder", field=item.key_or_group, code="sweep")
        if item.is_discrete_sweep() and not list(item.sweep_string_iterator()):
            raise UserError(
                f"'{item.input_line}' names no value, so there is no job", field=item.key_or_group, code="sweep"
            )


def _check_plugins(given: Sequence[Override]) -> None:
    """Hydra has the launcher and the sweeper that are asked for (inside `recipes`)."""
    for item in given:
        group, name = item.key_or_group, str(item.input_line).partition("=")[2]
        if group in ("hydra/launcher", "hydra/sweeper") and name not in group_choices(group):
            there = ", ".join(sorted(set(group_choices(group)) - {"basic"})) or "none"
            raise UserError(
                f"not installed: '{name}' (besides basic there is: {there})",
                field=group,
                hint="in the clone, pip install -e '.[sweep]' brings joblib; others are packages named hydra-NAME",
                code="no_launcher",
            )


def plan_of(words: list[str], config_dir: str | None) -> Plan:
    """Compose every combination that can be listed, and find what the jobs have in common.

    Args:
        words: overrides in Hydra's form.
    """
    own = [word for word in words if not word.lstrip("+").startswith("hydra")]
    listed = OverridesParser.create().parse_overrides(own)
    if any(item.is_sweep_override() and not item.is_discrete_sweep() for item in listed):
        fixed = [word for word, item in zip(own, listed, strict=True) if not item.is_sweep_override()]
        return Plan(compose(fixed, config_dir), [], [])
    jobs = combinations(listed)
    configs = [compose(words, config_dir) for words in jobs]
    for config in configs:
        check_sources(config)
    told = [[typed_form(word) for word in words if not _is_place(word)] for words in jobs]
    return Plan(configs[0], told, in_common(configs))


def in_common(configs: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """Stages that two or more jobs would train from equal inputs, in the order of the pipeline."""
    users: dict[tuple[str, str], list[int]] = {}
    for number, config in enumerate(configs):
        for stage, key in stage_keys(config).items():
            users.setdefault((stage, key), []).append(number)
    return [
        {"stage": stage, "key": key, "used_by": numbers} for (stage, key), numbers in users.items() if len(numbers) > 1
    ]


def stage_keys(config: RunConfig) -> dict[str, str]:
    """Stage -> hash of everything in the configuration that decides its result, its parents' hashes included.

    A stage that names no parent may stand on any stage before it, so it is taken to depend on all of them. Equal keys
    mean equal inputs; whether they really are is decided by content (`align/pipeline.py`) before anything is reused.
    """
    keys: dict[str, str] = {}
    for spec in config.stages:
        node = config.resolved["stages"][spec.name]
        options = {name: value for name, value in node.items() if name not in ("init", "reward")}
        judge = spec.stage.reward_model if spec.stage.needs_reward else "none"
        if not isinstance(node.get("reward"), str | None) or judge == "base":
            options["reward"] = node["reward"]  # signals, and no parent alone
        asked = [node.get("init"), judge, *spec.stage.ensemble]
        parents = [dict(keys) if wanted is None else keys.get(wanted, wanted) for wanted in asked]
        top = [config.seed, config.deterministic, config.on_precision_change.name, config.resolved["model"]]
        keys[spec.name] = sha256_json([spec.name, options, parents, top])
    return keys


def _counted(plan: Plan) -> str:
    """How much there is to do, in words."""
    stages = [shared["stage"] for shared in plan.shared]
    once = ", ".join(f"{stages.count(name)} {name}" for name in dict.fromkeys(stages))
    jobs = f"{len(plan.jobs)} job{'s' if len(plan.jobs) != 1 else ''}" if plan.jobs else "jobs as the sweeper decides"
    return f"{jobs}; shared and trained once: {once}" if once else jobs


def _digest(words: list[str]) -> str:
    """Eight hex digits that name a sweep."""
    return hashlib.sha256(json.dumps(sorted(words)).encode()).hexdigest()[:8]


def _is_place(word: str) -> bool:
    """Whether an override says where the sweep goes, which is not for its jobs."""
    return word.lstrip("+").partition("=")[0] in PLACE


def _is_hydra(item: Override) -> bool:
    """Whether an override is about Hydra itself: its launcher, its sweeper."""
    return item.key_or_group.replace("/", ".").split(".")[0] == "hydra"


def _parallel(given: Sequence[Override], jobs: int) -> list[str]:
    """joblib starts one process per core, each with its share of the cores: no more processes than there are jobs."""
    asked = {item.key_or_group: str(item.value()) for item in given if not item.is_sweep_override()}
    if asked.get("hydra/launcher") != "joblib" or "hydra.launcher.n_jobs" in asked or not jobs:
        return []
    return [f"hydra.launcher.n_jobs={max(1, min(jobs, len(os.sched_getaffinity(0))))}"]


def _launch(words: list[str], folder: Path, config_dir: str | None) -> None:
    """Hand the sweep to `hydra.main`, as if these words had been typed."""
    argv = ["align", "--multirun", *words, *QUIET, f"hydra.sweep.dir={quoted(str(folder))}"]
    argv += ["hydra.sweep.subdir=jobs/${hydra.job.num}", *(["--config-dir", config_dir] if config_dir else [])]
    before = sys.argv
    sys.argv = argv
    try:
        hydra.main(version_base="1.3", config_path=recipes_place(), config_name="config")(job)()
    except SystemExit as ended:
        if ended.code:
            raise UserError("Hydra ended the sweep (see above); the same command goes on", code="sweep") from ended
    finally:
        sys.argv = before
        logging.disable(logging.NOTSET)
