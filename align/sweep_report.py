"""The report of a sweep: one HTML page with the plots and the table, from sweep.json alone.

What is drawn follows from what varies. A number that varies becomes the x axis of the main metric, everything else that
varies becomes colours; without a number there is a dot for each combination. `seed` is no axis: its values repeat a
measurement, so their dots share a colour and the line goes through their mean. Imports no torch.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.plots import Axis, Dot, Series, dot_chart, key, plot, spans_decades
from align.run_files import finite, read_json
from align.sweep_table import METRICS, cells, short, shown_metrics, varied_keys
from align.words import duration, number, visible
from data_prep.errors import UserError
from reward.metrics import Z95

Row = dict[str, Any]
REPEATS = "seed"
LOWER_IS_BETTER = {"eval_loss", "kl"}
TITLES = {
    "gold": "gold score (share of replies that fit)",
    "gain": "gain in gold score over the parent",
    "win_rate": "win rate against the parent",
    "kl": "KL from the parent (nats per reply)",
    "accuracy": "accuracy of the reward model",
    "eval_loss": "held-out loss (nats per token)",
    "suggested_lr": "suggested learning rate",
}


def write_sweep_report(folder: Path) -> Path:
    """Write `report.html` into the folder of a sweep, and return its path.

    Raises:
        UserError: there is no readable sweep.json.
    """
    import jinja2

    notes: list[str] = []
    record = read_json(folder / "sweep.json", notes)
    if not record:
        raise UserError(notes[0] if notes else "no sweep.json here", code="no_sweep", file=str(folder))
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.finalize = lambda value: visible(value) if type(value) is str else value
    environment.filters.update(duration=duration, number=number)
    headings, lines = cells(record["rows"])
    page = environment.get_template("sweep.html.jinja").render(
        record=record,
        headline=headline(record),
        charts=charts(record["rows"]),
        headings=headings,
        rows=list(zip(record["jobs"], record["rows"], lines, strict=True)),
        linked={job["number"] for job in record["jobs"] if (folder / str(job["dir"]) / "report.html").is_file()},
        command=shlex.join(record["command"]),
    )
    staging, path = folder / f".report.html.{os.getpid()}", folder / "report.html"
    staging.write_text(page, encoding="utf-8")
    os.replace(staging, path)
    return path


def main_metric(rows: Sequence[Row]) -> str | None:
    """The metric that jobs are compared by."""
    return next(iter(shown_metrics(rows)), None)


def headline(record: Row) -> dict[str, Any]:
    """What the sweep says in two sentences: how far it got, which job is best, and how clearly."""
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
    title = f"Best {name}: {value}, with {_settings(best, rows) or 'the only settings'}."
    if len(level) > 1:
        title = f"No single best: {name} is {value} in {len(level)} of {len(measured)} jobs."
    sentences = [f"{told}."]
    error = finite(best["metrics"].get(f"{metric}_se"))
    if error is not None:
        alike = [row for row in measured if row not in level and _alike(row, best, metric)]
        if alike:
            jobs = ", ".join(str(row["job"]) for row in alike)
            sentences.append(
                f"Not clearly better than job{'s' if len(alike) > 1 else ''} {jobs}: the 95 % intervals overlap."
            )
        elif len(measured) > len(level):
            sentences.append(f"{'Its' if len(level) == 1 else 'Their'} 95 % interval overlaps no other job's.")
    return {"title": title, "sentences": sentences}


def _alike(row: Row, best: Row, metric: str) -> bool:
    """Whether the 95 % intervals of two jobs overlap."""
    one, other = _dot(row, 0.0, metric), _dot(best, 0.0, metric)
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return False
    return one.low <= other.high and other.low <= one.high


def charts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The plots that the rows allow, each with title, drawing and legend."""
    metric = main_metric(rows)
    if metric is None:
        return []
    found = []
    across = numeric_key(rows)
    measured = [row for row in rows if metric in row["metrics"]]
    if across and len({row["varied"][across] for row in measured if across in row["varied"]}) > 1:
        found.append(_over_key(measured, rows, across, metric))
    elif len(rows) > 1:
        found.append(_over_names(measured, rows, metric))
    if metric != "kl" and sum("kl" in row["metrics"] for row in measured) > 1:
        found.append(_over_metric(measured, rows, "kl", metric, across))
    sizes = {row["trainable"] for row in measured if row["trainable"]}
    if len(sizes) > 1:
        found.append(_over_size(measured, rows, metric))
    return found


def numeric_key(rows: Sequence[Row]) -> str | None:
    """The varied key with the most different numbers."""
    values = {name: {row["varied"].get(name) for row in rows} for name in varied_keys(rows) if name != REPEATS}
    numeric = {name: held for name, held in values.items() if all(finite(value) is not None for value in held)}
    return max(numeric, key=lambda name: len(numeric[name]), default=None)


def _series(measured: Sequence[Row], rows: Sequence[Row], without: Sequence[str]) -> dict[str, list[Row]]:
    """The rows by what varies in them apart from some keys: one colour each."""
    groups: dict[str, list[Row]] = {}
    for row in measured:
        groups.setdefault(_settings(row, rows, [*without, REPEATS]), []).append(row)
    return groups


def _settings(row: Row, rows: Sequence[Row], without: Sequence[str] = ()) -> str:
    """What varies, as words: `vera, kl_coef 0.05`."""
    names = short(varied_keys(rows))
    told = []
    for name, value in row["varied"].items():
        if name not in without:
            told.append(f"{names[name]} {value}" if finite(value) is not None else str(value))
    return ", ".join(told)


def _dot(row: Row, x: float, metric: str, label: str = "") -> Dot:
    value = float(row["metrics"][metric])
    error = finite(row["metrics"].get(f"{metric}_se"))
    low, high = (value - Z95 * error, value + Z95 * error) if error is not None else (None, None)
    told = ", ".join(f"{name.split('.')[-1]} {held}" for name, held in row["varied"].items())
    return Dot(x, value, low, high, f"job {row['job']}: {told}: {number(value)}", label)


def _chart(title: str, groups: Sequence[Series], x: Axis, y: Axis) -> dict[str, Any]:
    legend = [(key(index), each.name) for index, each in enumerate(groups)] if len(groups) > 1 else []
    return {"title": title, "drawing": plot(groups, x, y, title), "legend": legend}


def _over_key(measured: Sequence[Row], rows: Sequence[Row], across: str, metric: str) -> dict[str, Any]:
    """The main metric over the number that varies."""
    groups = [
        Series(name, [_dot(row, float(row["varied"][across]), metric) for row in held if across in row["varied"]])
        for name, held in _series(measured, rows, [across]).items()
    ]
    values = [dot.x for each in groups for dot in each.dots]
    name = short(varied_keys(rows))[across]
    axis = Axis(across, spans_decades(values))
    return _chart(f"{METRICS[metric][0]} over {name}", groups, axis, Axis(TITLES[metric]))


def _over_names(measured: Sequence[Row], rows: Sequence[Row], metric: str) -> dict[str, Any]:
    """The main metric of each combination."""
    named = [(name, [_dot(row, 0.0, metric) for row in held]) for name, held in _series(measured, rows, []).items()]
    values = [dot.y for _, dots in named for dot in dots]
    axis = Axis(TITLES[metric], metric == "suggested_lr" and spans_decades(values))
    title = f"{METRICS[metric][0]} by setting"
    return {"title": title, "drawing": dot_chart(named, axis, title), "legend": []}


def _over_metric(
    measured: Sequence[Row], rows: Sequence[Row], x: str, metric: str, across: str | None
) -> dict[str, Any]:
    """The main metric against another: what was gained for how far the policy moved."""
    names = short(varied_keys(rows))
    groups = []
    for name, held in _series(measured, rows, [across] if across else []).items():
        there = [row for row in held if x in row["metrics"]]
        dots = [
            _dot(row, row["metrics"][x], metric, str(row["varied"].get(across, "")) if len(rows) <= 12 else "")
            for row in there
        ]
        groups.append(Series(name, dots, line=False))
    groups = [each for each in groups if each.dots]
    chart = _chart(f"{METRICS[metric][0]} against {METRICS[x][0]}", groups, Axis(TITLES[x]), Axis(TITLES[metric]))
    return {**chart, "note": f"Beside the marks: {names[across]}." if across and len(rows) <= 12 else ""}


def _over_size(measured: Sequence[Row], rows: Sequence[Row], metric: str) -> dict[str, Any]:
    """The main metric over the number of trained parameters."""
    across = numeric_key(rows)
    groups = [
        Series(name, [_dot(row, float(row["trainable"]), metric) for row in held if row["trainable"]], line=False)
        for name, held in _series(measured, rows, [across] if across else []).items()
    ]
    groups = [each for each in groups if each.dots]
    values = [dot.x for each in groups for dot in each.dots]
    axis = Axis("trainable parameters", spans_decades(values))
    return _chart(f"{METRICS[metric][0]} over trainable parameters", groups, axis, Axis(TITLES[metric]))
