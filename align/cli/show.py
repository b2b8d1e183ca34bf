"""The verbs that only look: `align ls | show | lineage | verify`."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from align.checkpoints.resolve import newest
from align.cli.arguments import run_folder, say, split_words, target_of
from align.cli.option_rows import options_of, summary
from align.config.compose import explain
from align.config.hydra_loader import group_choices, recipe_comment, recipes
from align.config.overrides import parse, text_value
from align.config.registries import adapters, stages, trackers
from align.run_record import RunRecord
from data_prep.core.errors import UserError, nearest, unknown
from data_prep.core.options import plain
from data_prep.formats.base import FORMATS
from reward.rules import rules

ORIGIN_COLUMN = 48
Answer = tuple[int, dict[str, Any]]


def ls(args: argparse.Namespace) -> Answer:
    """List one kind of thing, or the names of all kinds."""
    words, overrides = split_words(args.words, 1)
    kinds: dict[str, Callable[[argparse.Namespace, list[str]], list[dict[str, Any]]]] = {
        "adapters": lambda args, overrides: _registered(adapters.items(), {"method"}),
        "stages": lambda args, overrides: _registered(stages.items(), {"data", "adapter"}),
        "data": lambda args, overrides: _recipe_rows(args, ["data"]),
        "models": lambda args, overrides: _recipe_rows(args, ["model"]),
        "recipes": lambda args, overrides: _recipe_rows(args, ["experiment", "pipeline"]),
        "trackers": lambda args, overrides: _named(trackers.items()),
        "formats": lambda args, overrides: _named(FORMATS.items()),
        "rules": lambda args, overrides: _named(rules.items()),
        "runs": lambda args, overrides: _runs(run_folder(overrides)),
    }
    if words and words[0] not in kinds:
        raise unknown("kind", words[0], kinds)
    answer = {kind: kinds[kind](args, overrides) for kind in (words or kinds)}
    for kind, rows in answer.items():
        say(args, kind if rows else f"{kind}: none")
        width = max((len(row["name"]) for row in rows), default=0)
        for row in rows:
            say(args, f"  {row['name']:<{width}}  {row['summary']}".rstrip())
            for option in row.get("options", []) if words else []:
                say(args, f"  {'':<{width}}    {option['name']} [{option['default']}]  {option['help']}")
    return 0, answer


def _registered(items: Sequence[tuple[str, Any]], without: set[str]) -> list[dict[str, Any]]:
    """The entries of a registry with their options."""
    return [{"name": name, "summary": summary(cls), "options": plain(options_of(cls, without))} for name, cls in items]


def _named(items: Sequence[tuple[str, Any]]) -> list[dict[str, Any]]:
    """The entries of a registry whose options stand elsewhere."""
    return [{"name": name, "summary": summary(choice)} for name, choice in items]


def _recipe_rows(args: argparse.Namespace, groups: list[str]) -> list[dict[str, Any]]:
    """The choices of config groups with the first words of their files."""
    with recipes(args.config_dir):
        return [
            {"name": f"{group}={name}", "summary": recipe_comment(group, name)}
            for group in groups
            for name in group_choices(group)
        ]


def _runs(out: str) -> list[dict[str, Any]]:
    """The folders of runs and sweeps below `out`, the newest first: methods, and what came of it."""
    found = [path for kind in ("run", "sweep") for path in Path(out).glob(f"*/{kind}.json")]
    rows = []
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            rows.append({"name": path.parent.name, **(_swept if path.stem == "sweep" else _ran)(path)})
        except (OSError, ValueError, KeyError, TypeError, UserError):
            summary = f"unreadable {path.name}: align verify {path.parent.name} says why"
            rows.append({"name": path.parent.name, "summary": summary})
    return rows


def _ran(path: Path) -> dict[str, Any]:
    """Status, methods and verdict of a run."""
    from align.report.page import conclusion

    run = RunRecord.open(path.parent)
    methods = list(dict.fromkeys(entry.adapter for entry in run.stages if entry.adapter))
    stages = ", ".join(entry.name for entry in run.stages if entry.status == "done") or "no stage"
    verdict = conclusion(path.parent)["headline"]
    said = verdict if run.status == "done" else f"{verdict} Finished: {stages}."
    return {
        "summary": f"{' and '.join(methods) or 'no method'}: {said}",
        "status": run.status,
        "methods": methods,
        "stages": [{"name": entry.name, "status": entry.status} for entry in run.stages],
        "verdict": verdict,
    }


def _swept(path: Path) -> dict[str, Any]:
    """Status of a sweep and of its jobs."""
    record = json.loads(path.read_text(encoding="utf-8"))
    jobs = Counter(job["status"] for job in record["jobs"])
    told = ", ".join(f"{count} {status}" for status, count in jobs.items())
    return {"summary": f"sweep {record['status']}: {told}", "status": record["status"], "jobs": dict(jobs)}


def show(args: argparse.Namespace) -> Answer:
    """Print a recipe with everything resolved: a run's own, an experiment's, or what overrides make of the default."""
    words, overrides = split_words(args.words, 1)
    if words:
        saved = _saved_recipe(words[0], overrides)
        if saved is not None:
            say(args, saved.rstrip())
            return 0, {"recipe": yaml.safe_load(saved)}
        with recipes(args.config_dir):
            known = group_choices("experiment")
        if words[0] not in known:
            near = nearest(words[0], known)
            hint = f"did you mean '{near}'?" if near else f"experiments: {', '.join(known)}"
            raise UserError(f"no run and no experiment '{words[0]}'", hint=hint, code="unknown_target")
        overrides = [f"experiment={words[0]}", *overrides]
    config, origins = explain(overrides, args.config_dir)
    say(args, *_annotated(config.resolved, origins))
    return 0, {"name": config.name, "digest": config.digest, "recipe": config.resolved, "origins": origins}


def _annotated(node: dict[str, Any], origins: dict[str, str], above: str = "") -> Iterator[str]:
    """A recipe as YAML, with the origin of each value as a comment."""
    pad = "  " * (above.count(".") + 1 if above else 0)
    for key, value in node.items():
        path = f"{above}.{key}" if above else key
        if isinstance(value, dict) and value:
            yield f"{pad}{key}:"
            yield from _annotated(value, origins, path)
        else:
            flat = yaml.safe_dump({key: value}, default_flow_style=True, allow_unicode=True, width=math.inf)
            yield f"{f'{pad}{flat.strip()[1:-1]}':<{ORIGIN_COLUMN}}  # {origins[path]}"


def _saved_recipe(target: str, overrides: Sequence[str]) -> str | None:
    """The `recipe.yaml` of a run or checkpoint, if `target` is one."""
    out = next((text_value(item) for item in parse(overrides) if item.key_or_group == "out"), "runs")
    target = newest(target, out)
    for folder in (Path(target), Path(out) / target):
        if (folder / "recipe.yaml").is_file():
            return (folder / "recipe.yaml").read_text(encoding="utf-8")
    return None


def lineage(args: argparse.Namespace) -> Answer:
    """Print the checkpoints that a target stands on."""
    from align.checkpoints.lineage import lineage as trace
    from align.checkpoints.resolve import resolve_target

    target, out, _ = target_of(args, "lineage")
    graph = trace(resolve_target(target, out, foreign=True))
    say(args, *_chain(graph))
    return 0, graph


def _chain(graph: dict[str, Any]) -> list[str]:
    """One line for each checkpoint, and under it what it stands on."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    lines = []
    for key, node in nodes.items():
        words = [str(node[name]) for name in ("stage", "role", "method", "load", "on_parent") if node.get(name)]
        lines.append(f"{' '.join(words)}  {key[:8]}  {node['path']}")
        for file, digest in node.get("labels", {}).items():
            lines.append(f"  labels: {file} {digest[:8]}")
        for edge in graph["edges"]:
            if edge["from"] == key:
                lines.append(f"  {edge['role']}: {nodes[edge['to']]['stage']} {edge['to'][:8]}")
    return lines


def verify(args: argparse.Namespace) -> Answer:
    """Check a checkpoint, or every checkpoint of a run; exit code 2 when a check fails."""
    from align.checkpoints.checkpoint import RECORD, Checkpoint
    from align.checkpoints.resolve import resolve_target

    target, out, base = target_of(args, "verify")
    folder = resolve_target(target, out)
    if (folder / RECORD).is_file():
        checks = Checkpoint.open(folder).verify(base)
    else:
        run = RunRecord.open(folder)
        checks = [
            {**check, "name": f"{entry.name}: {check['name']}"}
            for entry in run.stages
            if (run.at(entry) / RECORD).is_file()
            for check in Checkpoint.open(run.at(entry)).verify(base)
        ]
        if not checks:
            raise UserError("this run has no checkpoint yet", file=str(folder), code="no_checkpoint")
    for check in checks:
        say(args, f"{'ok  ' if check['ok'] else 'FAIL'}  {check['name']}  {check['detail']}".rstrip())
    good = all(check["ok"] for check in checks)
    say(args, f"{target}: {'all checks passed' if good else 'not intact'}")
    return (0 if good else 2), {"ok": good, "checks": checks}
