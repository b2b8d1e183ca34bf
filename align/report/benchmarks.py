"""The benchmarks of a report: every stage on tasks with paired changes, pairs by section, and what a judge prefers.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.report.conclusion import stages_of
from align.report.run_files import Json, StageFiles, finite, given, mapping

_TONES = {"better": "good", "worse": "bad"}


def benchmarks(measured: StageFiles) -> Json:
    """What `tasks`, `pairs` and `judge` of the evaluation found; {} where none was asked for."""
    tasks, pairs, preferred = _tasks(measured), _pairs(measured), _preferred(measured)
    found = {"tasks": tasks, "pairs": pairs, "judged": preferred}
    return found if any(found.values()) else {}


def _tasks(measured: StageFiles) -> Json:
    """{stages, before, rows}: a row for each metric of a task, with its value of each stage and the change over each
    stage before the last."""
    rows: list[Json] = []
    for name, task in mapping(measured.result.get("tasks")).items():
        task = mapping(task)
        for place, (metric, row) in enumerate(mapping(task.get("metrics")).items()):
            row = mapping(row)
            rows.append(
                {
                    "task": str(name),
                    "about": "" if place else ", ".join(_about(task)),
                    "metric": str(metric),
                    "falls": row.get("higher_is_better") is False,
                    "values": {stage: finite(value) for stage, value in mapping(row.get("stages")).items()},
                    "changes": {stage: _change(mapping(one)) for stage, one in mapping(row.get("changes")).items()},
                }
            )
    stages = list(dict.fromkeys(stage for row in rows for stage in row["values"]))
    before = [stage for stage in stages if any(row["changes"].get(stage) for row in rows)]
    return {"stages": stages, "before": before, "rows": rows} if rows else {}


def _about(task: Mapping[str, Any]) -> list[str]:
    """What is worth knowing of a task beside its numbers."""
    found = [f"{int(task['n']):,} documents"] if given(task.get("n")) else []
    if group := task.get("group"):
        found.append(f"of {', '.join(map(str, group))}")
    if shots := int(finite(task.get("shots")) or 0):
        found.append(f"{shots} examples before each")
    if task.get("chat"):
        found.append("in the chat template")
    if held := int(finite(mapping(task.get("contamination")).get("found")) or 0):
        found.append(f"{held:,} stand in the data")
    return found


def _change(change: Mapping[str, Any]) -> Json | None:
    """A paired change with its interval and tone, where all of it is there."""
    if not all(given(change.get(key)) for key in ("value", "low", "high")):
        return None
    return {**change, "tone": _TONES.get(str(change.get("verdict")), "plain")}


def _pairs(measured: StageFiles) -> Json:
    """{whole, sections, subsets} of the pairs that the reward model ordered; subsets where they say more."""
    held = mapping(measured.result.get("pairs"))
    if not all(given(held.get(key)) for key in ("accuracy", "low", "high")):
        return {}
    sections, subsets = _named(held.get("sections")), _named(held.get("subsets"))
    said = [row["name"] for row in sections] != [row["name"] for row in subsets]
    return {"whole": held, "sections": sections, "subsets": subsets if said else []}


def _named(groups: object) -> list[Json]:
    named = [(str(name), mapping(one)) for name, one in mapping(groups).items()]
    return [{**one, "name": name} for name, one in named if given(one.get("accuracy"))]


def _preferred(measured: StageFiles) -> Json:
    """{judge, last, rows}: what the judge behind an endpoint said of the last stage against each one before it."""
    held = mapping(measured.result.get("judged"))
    rows = {str(held.get("against")): held, **mapping(held.get("earlier"))}
    named = [{**mapping(row), "against": name} for name, row in rows.items()]
    whole = [row for row in named if all(given(row.get(key)) for key in ("value", "low", "high"))]
    return {"judge": held.get("judge"), "last": list(stages_of(measured))[-1:], "rows": whole} if whole else {}
