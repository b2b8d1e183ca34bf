"""What a run left in its folder, read leniently: an absent file is empty, an unreadable one is noted.

Stages are found only through `run.json`. Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.tracking import read_metrics
from data_prep.errors import UserError

Json = dict[str, Any]
Point = tuple[float, float]
"""(step, value)"""


@dataclass
class StageFiles:
    """What one stage left in the run folder; empty where a file is absent."""

    name: str
    entry: Json
    """Its row in run.json."""
    checkpoint: Json = field(default_factory=dict)
    recipe: Json = field(default_factory=dict)
    card: Json = field(default_factory=dict)
    result: Json = field(default_factory=dict)
    rows: list[Json] = field(default_factory=list)
    samples: list[Json] = field(default_factory=list)

    @property
    def metrics(self) -> Json:
        """Its final numbers, from run.json."""
        return self.entry.get("metrics") or {}

    def last(self, key: str) -> float | None:
        """The last logged value of a metric."""
        points = series(self.rows, key, "train") or series(self.rows, key, "eval")
        return points[-1][1] if points else finite(self.metrics.get(key))


def read_json(path: Path, notes: list[str]) -> Json:
    """A JSON object; {} where there is none, with a note where there is one that cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if isinstance(found, dict):
            return found
    except ValueError:
        pass
    notes.append(f"{path.parent.name}/{path.name} is not a JSON object")
    return {}


def read_lines(path: Path, notes: list[str]) -> list[Json]:
    """The rows of a JSON-lines file; [] where there is none, with a note where one cannot be read."""
    try:
        return read_metrics(path)
    except (UserError, ValueError) as problem:
        notes.append(f"{path.parent.name}/{path.name}: {getattr(problem, 'message', 'not UTF-8')}")
        return []


def _read_recipe(path: Path, notes: list[str]) -> Json:
    """The stage's resolved options; {} where there are none."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return found if isinstance(found, dict) else {}
    except (yaml.YAMLError, ValueError):
        notes.append(f"{path.parent.name}/{path.name} is not YAML")
        return {}


def read_stage(folder: Path, entry: Json, notes: list[str]) -> StageFiles:
    """Everything one stage left; `entry` is its row in run.json."""
    at = folder / str(entry.get("dir") or entry["name"])
    return StageFiles(
        name=str(entry["name"]),
        entry=entry,
        checkpoint=read_json(at / "checkpoint.json", notes),
        recipe=_read_recipe(at / "recipe.yaml", notes),
        card=read_json(at / "data_card.json", notes),
        result=read_json(at / "result.json", notes),
        rows=read_lines(at / "metrics.jsonl", notes),
        samples=[row for row in read_lines(at / "samples.jsonl", notes) if isinstance(row.get("replies"), dict)],
    )


def series(rows: Sequence[Json], key: str, split: str) -> list[Point]:
    """The finite values of one metric by step; where a resumed run wrote a step twice, the later one."""
    found = {}
    for row in rows:
        value = finite(row.get(key))
        if row.get("split") == split and value is not None:
            found[float(row.get("step", 0))] = value
    return sorted(found.items())


def given(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def finite(value: Any) -> float | None:
    """A finite number as a float, anything else as None."""
    return float(value) if given(value) else None


def gold_of(holder: Any) -> float | None:
    """The gold score of a reply or a stage, written as a number or as {"score": number, ...}."""
    if isinstance(holder, Mapping) and "gold" in holder:
        holder = holder["gold"]
    return finite(holder.get("score") if isinstance(holder, Mapping) else holder)
