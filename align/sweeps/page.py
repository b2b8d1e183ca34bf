"""The report of a sweep: one HTML page with the plots and the table, from sweep.json alone.

What is drawn follows from what varies. A number that varies becomes the x axis of the main metric, everything else that
varies becomes colours; without a number there is a dot for each combination. `seed` is no axis: its values repeat a
measurement, so their dots share a colour and the line goes through their mean. Imports no torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.report.formatting import duration, number, visible
from align.report.plots import COLOURS, Dot, Quantity, Series, coincide, dot_chart, key, plot, spans_decades
from align.report.run_files import finite, read_json
from align.sweeps.comparison import REPEATS, Row, headline, interval, main_metric, rates_of, settings, tuned
from align.sweeps.table import METRICS, cells, short, varied_keys
from data_prep.core.errors import UserError
from data_prep.core.files import write_text

MOST_TOLD = 12
"""Jobs up to which marks have words beside them."""
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
    loader = jinja2.FileSystemLoader([Path(__file__).parent, Path(__file__).parent.parent / "report"])
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
    path = folder / "report.html"
    write_text(path, page)
    return path


def charts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The plots that the rows allow, each with title, drawing and legend."""
    metric = main_metric(rows)
    if metric is None:
        return []
    found = []
    across = numeric_key(rows)
    measured = [row for row in rows if metric in row["metrics"]]
    best = tuned(rows)
    if best:
        found += _tuned(best, rows, metric)
    if len(best) > COLOURS:
        return found
    if across and len({row["varied"][across] for row in measured if across in row["varied"]}) > 1:
        found.append(_over_key(measured, rows, across, metric))
    elif len(rows) > 1:
        found.append(_over_names(measured, rows, metric))
    if metric != "kl" and sum("kl" in row["metrics"] for row in measured) > 1:
        found.append(_over_kl(measured, rows, metric))
    sizes = {row["trainable"] for row in measured if row["trainable"]}
    if len(sizes) > 1 and not best:
        found.append(_over_size(measured, rows, metric))
    return found


def _tuned(best: Sequence[Row], rows: Sequence[Row], metric: str) -> list[dict[str, Any]]:
    """What is compared, each at its best learning rate: side by side, and few of them over what they train."""
    dots = _over_names(best, rows, metric)
    dots["title"] += ", each at its best learning rate"
    sized = [row for row in best if row["trainable"]]
    if len({row["trainable"] for row in sized}) < 2 or len(sized) > COLOURS:
        return [dots]
    without = [*rates_of(rows), REPEATS]
    groups = [
        Series(settings(row, rows, without), [_dot(row, float(row["trainable"]), metric)], line=False) for row in sized
    ]
    axis = Quantity("trainable parameters", spans_decades([each.dots[0].x for each in groups]))
    title = f"{METRICS[metric][0]} over trainable parameters, each at its best learning rate"
    return [dots, _chart(title, groups, axis, Quantity(TITLES[metric]))]


def numeric_key(rows: Sequence[Row]) -> str | None:
    """The varied key with the most different numbers."""
    values = {name: {row["varied"].get(name) for row in rows} for name in varied_keys(rows) if name != REPEATS}
    numeric = {name: held for name, held in values.items() if all(finite(value) is not None for value in held)}
    return max(numeric, key=lambda name: len(numeric[name]), default=None)


def _series(measured: Sequence[Row], rows: Sequence[Row], without: Sequence[str]) -> dict[str, list[Row]]:
    """The rows by what varies in them apart from some keys: one colour each."""
    groups: dict[str, list[Row]] = {}
    for row in measured:
        groups.setdefault(settings(row, rows, [*without, REPEATS]), []).append(row)
    return groups


def _dot(row: Row, x: float, metric: str, label: str = "") -> Dot:
    value = float(row["metrics"][metric])
    low, high = interval(row, metric) or (None, None)
    told = ", ".join(f"{name.split('.')[-1]} {held}" for name, held in row["varied"].items())
    return Dot(x, value, low, high, f"job {row['job']}: {told}: {number(value)}", label)


def _chart(title: str, groups: Sequence[Series], x: Quantity, y: Quantity) -> dict[str, Any]:
    legend = [(key(index), each.name) for index, each in enumerate(groups)] if len(groups) > 1 else []
    apart = coincide(groups)
    note = "Marks of several colours at one value are drawn side by side." if apart else ""
    return {"title": title, "drawing": plot(groups, x, y, title, apart=apart), "legend": legend, "note": note}


def _over_key(measured: Sequence[Row], rows: Sequence[Row], across: str, metric: str) -> dict[str, Any]:
    """The main metric over the number that varies."""
    groups = [
        Series(name, [_dot(row, float(row["varied"][across]), metric) for row in held if across in row["varied"]])
        for name, held in _series(measured, rows, [across]).items()
    ]
    values = [dot.x for each in groups for dot in each.dots]
    name = short(varied_keys(rows))[across]
    axis = Quantity(across, spans_decades(values))
    return _chart(f"{METRICS[metric][0]} over {name}", groups, axis, Quantity(TITLES[metric]))


def _over_names(measured: Sequence[Row], rows: Sequence[Row], metric: str) -> dict[str, Any]:
    """The main metric of each combination."""
    named = [(name, [_dot(row, 0.0, metric) for row in held]) for name, held in _series(measured, rows, []).items()]
    values = [dot.y for _, dots in named for dot in dots]
    axis = Quantity(TITLES[metric], metric == "suggested_lr" and spans_decades(values))
    title = f"{METRICS[metric][0]} by setting"
    return {"title": title, "drawing": dot_chart(named, axis, title), "legend": [], "note": ""}


def _over_kl(measured: Sequence[Row], rows: Sequence[Row], metric: str) -> dict[str, Any]:
    """The main metric against the KL: what was gained for how far the policy moved."""
    places = [row["metrics"].get("kl") for row in measured]
    return _against(measured, rows, metric, places, Quantity(TITLES["kl"]), "against KL")


def _over_size(measured: Sequence[Row], rows: Sequence[Row], metric: str) -> dict[str, Any]:
    """The main metric over the number of trained parameters."""
    places = [row["trainable"] or None for row in measured]
    axis = Quantity("trainable parameters", spans_decades([place for place in places if place]))
    return _against(measured, rows, metric, places, axis, "over trainable parameters")


def _against(
    measured: Sequence[Row], rows: Sequence[Row], metric: str, places: Sequence[float | None], x: Quantity, title: str
) -> dict[str, Any]:
    """The main metric over a measured number, where there is one; beside the marks the number that varies."""
    across = numeric_key(rows)
    told = across if across and len(rows) <= MOST_TOLD else None
    at = {row["job"]: place for row, place in zip(measured, places, strict=True) if place is not None}
    groups = []
    for name, held in _series(measured, rows, [across] if across else []).items():
        there = [row for row in held if row["job"] in at]
        texts = [str(row["varied"].get(told, "")) for row in there]
        dots = [_dot(row, float(at[row["job"]]), metric, text) for row, text in zip(there, texts, strict=True)]
        groups.append(Series(name, dots, line=False))
    chart = _chart(f"{METRICS[metric][0]} {title}", [each for each in groups if each.dots], x, Quantity(TITLES[metric]))
    if told:
        chart["note"] = f"Beside the marks: {short(varied_keys(rows))[told]}. {chart['note']}".rstrip()
    return chart
