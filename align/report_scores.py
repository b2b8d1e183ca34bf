"""The scores of a report: every stage on the same held-out prompts, and how far the reward model can be believed.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from align.run_files import Json, StageFiles, given, gold_of, mapping
from align.svg_figures import reliability
from align.verdict import stages_of

BIN = ("from", "to", "n", "confidence", "accuracy")


def scores(measured: StageFiles) -> Json:
    """What the evaluation gives each stage; `parts` are the gold rule's own parts."""
    named = stages_of(measured)
    parts = [key for row in named.values() for key in mapping(row.get("gold")) if key not in ("score", "n", "se")]
    return {
        "stages": named,
        "parts": list(dict.fromkeys(parts)),
        "n": _count(named),
        "gold": any(gold_of(row.get("gold")) is not None for row in named.values()),
    }


def _count(named: dict[str, Json]) -> int | None:
    counts = {row["n"] for row in named.values() if given(row.get("n"))}
    return int(counts.pop()) if len(counts) == 1 else None


def judge(stages: Sequence[StageFiles], measured: StageFiles) -> Json:
    """The reward model's numbers, from the evaluation or the stage that trained it; {} where there are none."""
    own = next((s.metrics for s in stages if given(s.metrics.get("ece"))), {})
    found = {**own, **mapping(measured.result.get("reward_model"))}
    if not given(found.get("accuracy")):
        return {}
    bins = found.get("calibration")
    bins = [b for b in bins if isinstance(b, dict) and all(given(b.get(key)) for key in BIN)] if bins else []
    return {**found, "bins": bins, "drawing": reliability(bins) if bins else ""}
