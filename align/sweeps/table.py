"""The rows of a sweep as text and as CSV. Imports no torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from align.report.formatting import NONE, duration, fixed, number, percent, signed, size

METRICS = {
    "gold": ("gold", fixed),
    "gain": ("gain", signed),
    "win_rate": ("win rate", percent),
    "kl": ("KL", number),
    "accuracy": ("RM acc.", percent),
    "eval_loss": ("eval loss", number),
    "suggested_lr": ("suggested lr", number),
}
"""What jobs are compared by, the most telling first: key -> (heading, how it is shown)."""


def short(keys: Sequence[str]) -> dict[str, str]:
    """Key -> its last words, as many as are needed to tell the keys apart: `kl_coef`, or `ppo.lr` beside `sft.lr`."""
    names = {}
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[-count:])
            if sum(other == name or other.endswith(f".{name}") for other in keys) == 1:
                break
        names[key] = name
    return names


def varied_keys(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Keys of the overrides that vary, in order."""
    return list(dict.fromkeys(key for row in rows for key in row["varied"]))


def shown_metrics(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The metrics that some job has."""
    return [key for key in METRICS if any(key in row["metrics"] for row in rows)]


def cells(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings, and the rows as people read them; a column that would be empty is left out."""
    keys, metrics = varied_keys(rows), shown_metrics(rows)
    names = short(keys)
    headings = ["job", *(names[key] for key in keys), *(METRICS[key][0] for key in metrics)]
    timed = any(row["tokens_per_second"] for row in rows)
    headings += ["trainable", "share", "saved", "memory", *(["tokens/s"] if timed else []), "time", "status"]
    lines = []
    for row in rows:
        line = [str(row["job"]), *(str(row["varied"].get(key, NONE)) for key in keys)]
        line += [METRICS[key][1](row["metrics"][key]) if key in row["metrics"] else NONE for key in metrics]
        line += [number(row["trainable"]), percent(row["share"]), size(row["weights_bytes"])]
        line += [size(row["peak_rss_bytes"]), *([number(row["tokens_per_second"])] if timed else [])]
        lines.append([*line, duration(row["seconds"]), row["status"]])
    return headings, lines


def as_text(record: dict[str, Any], width: int | None = None, best: Sequence[dict[str, Any]] = ()) -> str:
    """The table; where the lines are longer than `width`, each job as a block of its own.

    Under it: the rows of `best` once more, what was shared, and why jobs failed.
    """
    rows = record["rows"]
    text = _laid_out(rows, width)
    if best:
        text += ["", "each at its best learning rate:", *_laid_out(best, width), ""]
    for shared in record["shared"]:
        jobs = ", ".join(map(str, shared["used_by"]))
        took = f"trained once in {duration(shared['seconds'])}" if shared["digest"] else "not trained yet"
        text.append(f"shared {shared['stage']} ({shared['adapter'] or NONE}): {took}, used by jobs {jobs}")
    text += [f"job {row['job']}: {row['error']}" for row in rows if row["error"]]
    return "\n".join(text)


def _laid_out(rows: Sequence[dict[str, Any]], width: int | None) -> list[str]:
    """The lines of a table of rows."""
    headings, lines = cells(rows)
    widths = [max(len(line[i]) for line in [headings, *lines]) for i in range(len(headings))]
    right = [all(_is_number(line[i]) for line in lines) for i in range(len(headings))]
    if width is None or sum(widths) + 2 * (len(widths) - 1) <= width:
        padded = [
            [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)]
            for line in [headings, *lines]
        ]
        return ["  ".join(line).rstrip() for line in padded]
    gap = max(len(heading) for heading in headings)
    return ["\n".join(f"{h:<{gap}}  {c}" for h, c in zip(headings, line, strict=True)) + "\n" for line in lines]


def _is_number(text: str) -> bool:
    """Whether a cell starts like a number or holds none."""
    return text == NONE or text.lstrip("+-\N{MINUS SIGN}")[:1].isdigit()


def as_csv(record: dict[str, Any]) -> str:
    """Every number of every job, one line each, plain: no units, full precision."""
    rows = record["rows"]
    keys = varied_keys(rows)
    metrics = list(dict.fromkeys(key for row in rows for key in row["metrics"]))
    every = list(dict.fromkeys(key for row in rows for key in row["every"]))
    plain = ["trainable", "total", "share", "weights_bytes", "peak_rss_bytes", "tokens_per_second"]
    plain += ["seconds", "shared_seconds"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["job", "status", *keys, *metrics, *plain, *every, "error"])
    for row in rows:
        line = [row["job"], row["status"], *(row["varied"].get(key) for key in keys)]
        line += [row["metrics"].get(key) for key in metrics] + [row[key] for key in plain]
        writer.writerow([*line, *(row["every"].get(key) for key in every), row["error"]])
    return out.getvalue()
