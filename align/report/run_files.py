"""What a run left in its folder, read leniently: an absent file is empty, what cannot be read is noted.

Stages are found only through `run.json`. Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]
Point = tuple[float, float]
"""(step, value)"""


@dataclass
class StageFiles:
    """What one stage left in the run folder; empty where a file is absent."""

    name: str
    entry: Json
    """Its row in run.json."""
    folder: Path = Path()
    checkpoint: Json = field(default_factory=dict)
    recipe: Json = field(default_factory=dict)
    card: Json = field(default_factory=dict)
    result: Json = field(default_factory=dict)
    rows: list[Json] = field(default_factory=list)
    samples: list[Json] = field(default_factory=list)
    warnings: list[Json] = field(default_factory=list)

    @property
    def status(self) -> str:
        """running, done, failed or stopped."""
        return str(self.entry.get("status") or "")

    @property
    def metrics(self) -> Json:
        """Its final numbers, from run.json."""
        return mapping(self.entry.get("metrics"))

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
    except (ValueError, OSError, RecursionError):
        pass
    notes.append(f"{path.parent.name}/{path.name} is not a JSON object")
    return {}


def read_lines(path: Path, notes: list[str]) -> list[Json]:
    """The rows of a JSON-lines file; [] where there is none. Rows that cannot be read are left out and counted.

    A last row without a line end belongs to a run that is writing, or was killed: it is left out silently.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    except OSError as problem:
        notes.append(f"{path.parent.name}/{path.name}: {problem.strerror or problem}")
        return []
    rows: list[Json] = []
    bad = []
    for place, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad.append(place)
    if bad:
        count = f"{len(bad)} of {len(lines)} rows are" if len(bad) > 1 else f"1 of {len(lines)} rows is"
        notes.append(f"{path.parent.name}/{path.name}: {count} not a JSON object (first: row {bad[0]})")
    return rows


def read_recipe(path: Path, notes: list[str]) -> Json:
    """Resolved options; {} where there are none."""
    import yaml

    try:
        safe = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, ten times as fast, where PyYAML has it
        found = safe(path.read_text(encoding="utf-8")).get_single_data() if path.is_file() else {}
        return found if isinstance(found, dict) else {}
    except (yaml.YAMLError, ValueError, OSError, RecursionError):
        notes.append(f"{path.parent.name}/{path.name} is not YAML")
        return {}


def read_stages(folder: Path, run: Json, notes: list[str]) -> list[StageFiles]:
    """Everything the stages of a run left, in the order of run.json."""
    entries = run.get("stages")
    found = []
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and entry.get("name"):
            found.append(_read_stage(folder, entry, notes))
        else:
            notes.append("run.json: an entry of stages has no name")
    return found


def _read_stage(folder: Path, entry: Json, notes: list[str]) -> StageFiles:
    at = folder / str(entry.get("dir") or entry["name"])
    return StageFiles(
        name=str(entry["name"]),
        entry=entry,
        folder=at,
        checkpoint=read_json(at / "checkpoint.json", notes),
        recipe=read_recipe(at / "recipe.yaml", notes),
        card=read_json(at / "data_card.json", notes),
        result=read_json(at / "result.json", notes),
        rows=read_lines(at / "metrics.jsonl", notes),
        samples=read_lines(at / "samples.jsonl", notes),
        warnings=read_lines(at / "warnings.jsonl", notes),
    )


def series(rows: Sequence[Json], key: str, split: str) -> list[Point]:
    """The finite values of one metric by step; where a resumed run wrote a step twice, the later one."""
    found = {}
    for row in rows:
        value, step = finite(row.get(key)), finite(row.get("step", 0))
        if row.get("split") == split and value is not None and step is not None:
            found[step] = value
    return sorted(found.items())


def mapping(value: Any) -> Json:
    """The value if it is a JSON object, else {}."""
    return value if isinstance(value, dict) else {}


def given(value: Any) -> bool:
    """Whether a value is a finite number."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        return False


def finite(value: Any) -> float | None:
    """A finite number as a float, anything else as None."""
    return float(value) if given(value) else None


def gold_of(holder: Any) -> float | None:
    """The gold score of a reply or a stage, written as a number or as {"score": number, ...}."""
    if isinstance(holder, Mapping) and "gold" in holder:
        holder = holder["gold"]
    return finite(holder.get("score") if isinstance(holder, Mapping) else holder)
