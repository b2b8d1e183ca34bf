"""`align run -m`: every combination of the values given with commas, by Hydra's own sweepers and launchers.

Jobs land in OUT/NAME/jobs/<i>/ as ordinary runs; OUT/NAME/sweep.json says how each ended. A job that fails does not
stop the others. All combinations are composed before the first job starts, so that a typing error costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser

from align.composition import recipes, recipes_place
from align.config import RunConfig, compose, survey
from align.overrides import NAMES, parse, rewrite
from align.preflight import check_sources
from data_prep.errors import TrainingStopped, UserError

PLACE = ("out", "name")
QUIET = ["hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.job.chdir=false"]


def sweep(overrides: Sequence[str], config_dir: str | None) -> tuple[int, dict[str, Any]]:
    """Run all jobs and return (exit code, content of sweep.json). The code is that of the first job that failed.

    Raises:
        UserError: a mistake in any combination, before the first job starts.
    """
    given = parse(overrides)
    for override in given:
        if override.key_or_group in PLACE and override.is_sweep_override():
            raise UserError("cannot be swept: all jobs share one folder", field=override.key_or_group, code="sweep")
    with recipes(config_dir):
        words = rewrite(given, survey(given)[1])
    first = _composed_first(words, config_dir)
    swept = [word for word in words if word.lstrip("+").partition("=")[0] not in PLACE]
    given_name = any(item.key_or_group == "name" for item in given)
    folder = Path(first.out) / (first.name if given_name else f"{first.pipeline}-{_digest(swept)}")
    folder.mkdir(parents=True, exist_ok=True)
    _launch(swept, folder, config_dir)
    return _record(folder)


def _composed_first(words: list[str], config_dir: str | None) -> RunConfig:
    """Compose every combination that can be listed; the first is returned."""
    own = [word for word in words if not word.lstrip("+").startswith("hydra")]
    listed = OverridesParser.create().parse_overrides(own)
    if any(item.is_sweep_override() and not item.is_discrete_sweep() for item in listed):
        return compose(
            [word for word, item in zip(own, listed, strict=True) if not item.is_sweep_override()], config_dir
        )
    jobs = [list(job) for batch in BasicSweeper.split_arguments(listed, None) for job in batch]
    configs = [compose(job, config_dir) for job in jobs]
    for config in configs:
        check_sources(config)
    return configs[0]


def _digest(words: list[str]) -> str:
    """Eight hex digits that name a sweep."""
    return hashlib.sha256(json.dumps(sorted(words)).encode()).hexdigest()[:8]


def _launch(words: list[str], folder: Path, config_dir: str | None) -> None:
    """Hand the sweep to `hydra.main`, as if these words had been typed."""
    for stale in (folder / "jobs").glob("*.json"):
        stale.unlink()
    argv = ["align", "--multirun", *words, *QUIET, f"hydra.sweep.dir={_quoted(str(folder.absolute()))}"]
    argv += ["hydra.sweep.subdir=jobs/${hydra.job.num}", *(["--config-dir", config_dir] if config_dir else [])]
    before = sys.argv
    sys.argv = argv
    try:
        entry = hydra.main(version_base="1.3", config_path=recipes_place(), config_name="config")
        entry(_job(str(folder.absolute()), config_dir))()
    except SystemExit as ended:
        if ended.code:
            raise UserError("the sweep could not be started (see above)", code="sweep") from ended
    finally:
        sys.argv = before
        logging.disable(logging.NOTSET)


def _job(folder: str, config_dir: str | None) -> Callable[[Any], None]:
    """What each job does: compose its own overrides and run, and write down how it ended."""

    def job(tree: Any) -> None:
        settings = HydraConfig.get()
        run_job(int(settings.job.num), list(settings.overrides.task), folder, config_dir)

    return job


def run_job(number: int, words: list[str], folder: str, config_dir: str | None) -> None:
    """Run one job of a sweep in `folder`/jobs/`number` and write `folder`/jobs/`number`.json."""
    shown = [typed_form(word) for word in words]
    print(f"job {number}: {' '.join(shown)}", file=sys.stderr)
    ended: dict[str, Any] = {"number": number, "overrides": shown, "dir": f"jobs/{number}", "status": "failed"}
    try:
        from align import pipeline

        place = [f"out={_quoted(f'{folder}/jobs')}", f"name={number}"]
        record = pipeline.run(compose([*shown, *place], config_dir))
        ended.update(status=record["status"], exit_code=0)
    except (UserError, TrainingStopped) as problem:
        print(f"align: job {number}: {problem}", file=sys.stderr)
        ended.update(exit_code=problem.exit_code, error=problem.as_dict())
    except Exception as problem:
        traceback.print_exc()
        message = f"{type(problem).__name__}: {problem}"
        ended.update(exit_code=1, error=UserError(message, code="internal").as_dict())
    path = Path(folder) / "jobs" / f"{number}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ended, indent=1), encoding="utf-8")


def typed_form(word: str) -> str:
    """A rewritten override as a person would type it."""
    for group, key in NAMES.items():
        word = word.replace(f".{group}.{key}=", f".{group}=")
    return word.removeprefix("++")


def _quoted(path: str) -> str:
    """A path as a value that Hydra takes as it is."""
    return "'" + path.replace("'", "\\'") + "'"


def _record(folder: Path) -> tuple[int, dict[str, Any]]:
    """Write sweep.json from what the jobs left, and print one line for each."""
    paths = sorted((folder / "jobs").glob("*.json"), key=lambda path: int(path.stem))
    jobs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    failed = [job for job in jobs if job["exit_code"]]
    record = {
        "format_version": 1,
        "name": folder.name,
        "dir": str(folder),
        "status": "failed" if failed or not jobs else "done",
        "jobs": jobs,
    }
    (folder / "sweep.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    common = set.intersection(*(set(job["overrides"]) for job in jobs)) if jobs else set()
    for job in jobs:
        varied = [word for word in job["overrides"] if word not in common]
        print(f"{job['status']:<8} {folder / job['dir']}  {' '.join(varied)}")
    return int(failed[0]["exit_code"]) if failed else 0 if jobs else 1, record
