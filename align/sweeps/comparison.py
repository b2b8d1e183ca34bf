"""What a sweep says in words: which job is best, how clearly, and which settings made no difference.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from align.report.run_files import finite
from align.sweeps.table import METRICS, short, shown_metrics, varied_keys
from reward.metrics import Z95, accuracy_interval

Row = dict[str, Any]
REPEATS = "seed"
LOWER_IS_BETTER = {"eval_loss", "kl"}
SHARES = {"gold", "win_rate", "accuracy"}
MOST_LISTED = 6
RATES = ("lr", "lr_scale")
"""Last words of the keys that are tuned rather than compared."""


def main_metric(rows: Sequence[Row]) -> str | None:
    """The metric that jobs are compared by."""
    return next(iter(shown_metrics(rows)), None)


def settings(row: Row, rows: Sequence[Row], without: Sequence[str] = ()) -> str:
    """What varies, as words: `vera, kl_coef 0.05`."""
    names = short(varied_keys(rows))
    told = []
    for name, value in row["varied"].items():
        if name not in without:
            told.append(f"{names[name]} {value}" if finite(value) is not None else str(value))
    return ", ".join(told)


def rates_of(rows: Sequence[Row]) -> list[str]:
    """The varied keys that are learning rates or factors on them."""
    return [key for key in varied_keys(rows) if key.rpartition(".")[2] in RATES]


def tuned(rows: Sequence[Row]) -> list[Row]:
    """Of jobs that differ in their learning rate alone the best each, best first; none where nothing else varies.

    A method at a rate that does not suit it says little about the method.
    """
    metric = main_metric(rows)
    rates = rates_of(rows)
    if metric is None or not rates:
        return []
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if metric in row["metrics"]:
            groups.setdefault(settings(row, rows, [*rates, REPEATS]), []).append(row)
    if len(groups) < 2:
        return []
    down = metric in LOWER_IS_BETTER

    def value(row: Row) -> float:
        return float(row["metrics"][metric])

    best = [(min if down else max)(held, key=value) for held in groups.values()]
    return sorted(best, key=value, reverse=not down)


def interval(row: Row, metric: str) -> tuple[float, float] | None:
    """The 95 % interval (low, high) of a job's metric, None where its uncertainty is not known.

    Of a share it is Wilson's, which stays within 0..1: over `<metric>_n` cases, else over as many as its standard error
    tells of. Of a gain it is the value and 1.96 standard errors, cut at the greatest change there can be.
    """
    value, error = float(row["metrics"][metric]), finite(row["metrics"].get(f"{metric}_se"))
    if metric in SHARES and 0 <= value <= 1:
        count = finite(row["metrics"].get(f"{metric}_n"))
        if count is None and error:
            count = value * (1 - value) / error**2
        n = round(count or 0)
        return accuracy_interval(value * n, n)[1:] if n else None
    if error is None:
        return None
    low, high = value - Z95 * error, value + Z95 * error
    return (max(low, -1.0), min(high, 1.0)) if metric == "gain" else (low, high)


def alike(one: Row, other: Row, metric: str) -> bool:
    """Whether two jobs are equal in a metric or their 95 % intervals overlap."""
    if one["metrics"][metric] == other["metrics"][metric]:
        return True
    a, b = interval(one, metric), interval(other, metric)
    return a is not None and b is not None and a[0] <= b[1] and b[0] <= a[1]


def headline(record: Row) -> dict[str, Any]:
    """What the sweep says in a few sentences: how far it got, the best job, how clearly, and what had no effect."""
    rows = record["rows"]
    counts = {status: sum(row["status"] == status for row in rows) for status in ("done", "failed")}
    told = f"{counts['done']} of {len(rows)} jobs done" + (f", {counts['failed']} failed" if counts["failed"] else "")
    metric = main_metric(rows)
    measured = [row for row in rows if metric in row["metrics"]]
    if metric is None or not measured or metric == "suggested_lr":
        return {"title": f"{told}.", "sentences": ["No job has been measured yet."] if metric is None else []}
    down = metric in LOWER_IS_BETTER
    best = sorted(measured, key=lambda row: float(row["metrics"][metric]), reverse=not down)[0]
    name, show = METRICS[metric]
    value = show(best["metrics"][metric])
    level = [row for row in measured if row["metrics"][metric] == best["metrics"][metric]]
    title = f"Best {name}: {value}, with {settings(best, rows) or 'the only settings'}."
    if len(level) > 1:
        title = f"No single best: {name} is {value} in {len(level)} of {len(measured)} jobs."
    sentences = [f"{told}."]
    if interval(best, metric) is not None:
        others = [row for row in measured if row not in level]
        close = [row for row in others if alike(row, best, metric)]
        if close:
            jobs = f"job{'s' if len(close) > 1 else ''} {', '.join(str(row['job']) for row in close)}"
            jobs = jobs if len(close) <= MOST_LISTED else f"{len(close)} other jobs"
            sentences.append(f"Not clearly better than {jobs}: the 95 % intervals overlap.")
        elif others:
            sentences.append(f"{'Its' if len(level) == 1 else 'Their'} 95 % interval overlaps no other job's.")
    return {"title": title, "sentences": [*sentences, *without_effect(rows, metric)]}


def without_effect(rows: Sequence[Row], metric: str) -> list[str]:
    """One sentence that names the varied keys that made no difference in a metric, or none.

    A key is named when jobs that differ in nothing but this key were measured, and all such jobs are equal or have
    overlapping 95 % intervals.
    """
    measured = [row for row in rows if metric in row["metrics"]]
    names, found, equal = short(varied_keys(rows)), [], True
    for key in varied_keys(rows):
        pairs = [pair for pair in combinations(measured, 2) if _differ_in(*pair) == {key}]
        if key != REPEATS and pairs and all(alike(*pair, metric) for pair in pairs):
            found.append(names[key])
            equal = equal and all(one["metrics"][metric] == other["metrics"][metric] for one, other in pairs)
    if not found:
        return []
    subject = " and ".join(filter(None, [", ".join(found[:-1]), found[-1]]))
    verb = "makes" if len(found) == 1 else "make"
    shown = f"{METRICS[metric][0]} is the same" if equal else f"the 95 % intervals of {METRICS[metric][0]} overlap"
    return [
        f"{subject} {verb} no {'' if equal else 'clear '}difference here: with all else equal, {shown}; "
        "longer training or more held-out prompts may show one."
    ]


def _differ_in(one: Row, other: Row) -> set[str]:
    """The varied keys in which two jobs differ."""
    return {key for key in {*one["varied"], *other["varied"]} if one["varied"].get(key) != other["varied"].get(key)}
