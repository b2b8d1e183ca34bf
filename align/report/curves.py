"""The curves of a report: every number that a stage logged, the telling ones first. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from align.report.charts import curve, smoothed
from align.report.formatting import number
from align.report.plots import Dot, Quantity, Series, plot
from align.report.run_files import Json, StageFiles, given, series


@dataclass(frozen=True)
class Shown:
    """A metric that is drawn in the open, and how."""

    title: str
    unit: str = ""
    floor: float | None = None
    """Values below are drawn at it: a critic's first updates may explain far less than nothing."""
    beside: str = ""
    """A second metric in the same drawing."""
    called: str = ""
    """What the second metric is."""


KNOWN = {
    "objective/reward": Shown(
        "Reward", "less the KL penalty", beside="objective/score_shaped", called="before the penalty"
    ),
    "gold/score": Shown("Gold score", "held-out replies"),
    "objective/kl_k1": Shown("KL from the parent", "nats per reply"),
    "objective/entropy": Shown("Entropy", "nats per token"),
    "response/len_mean": Shown("Reply length", "tokens, mean", beside="response/len_p95", called="95th percentile"),
    "response/eos_rate": Shown("Replies that end", "share"),
    "policy/clipfrac": Shown("Clipped ratios", "share of tokens"),
    "value/explained_var": Shown("Variance the critic explains", "share", floor=-1.0),
    "loss": Shown("Loss", "nats"),
    "accuracy": Shown("Pairs ordered rightly", "share"),
    "margin": Shown("Margin", "chosen less rejected score"),
    "rewards/chosen": Shown(
        "Rewards of chosen replies", "implicit reward", beside="rewards/rejected", called="rejected"
    ),
    "rewards/margins": Shown("Margin", "chosen less rejected reward"),
    "rewards/accuracies": Shown("Replies judged rightly", "share"),
    "kl": Shown("KL to the reference", "nats per reply, the reference point"),
}
"""By key of metrics.jsonl, in the order of the page. Every other key is drawn in a fold below."""
MIN_LOOKS = 3
MOST_FOLDED = 24
MOST_ROWS = 60
NOT_CURVES = {"stage", "step", "split"}


def curves(stage: StageFiles, folded: bool = True) -> Json | None:
    """The stage's drawings {shown, folded} and its evaluations as a table; None where it logged nothing."""
    keys = list(dict.fromkeys(key for row in stage.rows for key in row if key not in NOT_CURVES))
    rewarded = any(key.startswith("objective/") for key in keys)
    secondary = {"loss"} if rewarded else set()  # a loss of policy and critic together says little
    secondary |= {known.beside for known in KNOWN.values() if known.beside in keys}
    first = [key for key in KNOWN if key in keys and key not in secondary]
    first += [key for key in keys if key.startswith("loss/")]
    rest = [key for key in keys if key not in first and (key not in secondary or key == "loss")]
    unit = "update" if rewarded else "step"
    shown = list(_drawn(stage, first, unit))
    shown[:0] = [drawn for drawn in (_over_rates(stage), _over_distance(stage)) if drawn]
    more = list(_drawn(stage, rest[:MOST_FOLDED], unit)) if folded else []
    if not shown and not more:
        return None
    return {"name": stage.name, "shown": shown, "folded": more, "unit": unit, "table": evaluations(stage)}


def _drawn(stage: StageFiles, keys: Iterable[str], unit: str) -> Iterable[Json]:
    for key in keys:
        known = KNOWN.get(key) or Shown(f"Loss, {key[5:]}" if key.startswith("loss/") else key)
        line, dots = (series(stage.rows, key, split) for split in ("train", "eval"))
        beside = series(stage.rows, known.beside, "train") if known.beside else []
        if not line and not dots:
            continue
        remarks = []
        if (window := smoothed(line)[1]) > 1:
            remarks.append(f"line: mean of {window} {unit}s; faint: every {unit}")
        if beside:
            remarks.append(f"dashed: {known.called}, {number(beside[-1][1])} at the end")
        if known.floor is not None and any(y < known.floor for _, y in (*line, *dots)):
            remarks.append(f"lower values drawn at {number(int(known.floor))}")
        final = (dots or line)[-1][1]
        drawing = curve(line, dots, f"{known.title} of {stage.name}", known.floor, beside, unit)
        yield {
            "title": known.title,
            "unit": known.unit,
            "final": final,
            "of": "held out" if dots else "last",
            "drawing": drawing,
            "remark": "; ".join(remarks),
        }


def _over_rates(stage: StageFiles) -> Json | None:
    """The losses of a learning-rate range test over the rates, where the stage was one."""
    columns: list[Any] = [stage.result.get(key) for key in ("lrs", "smoothed", "losses")]
    if not all(isinstance(column, list) and column and all(map(given, column)) for column in columns):
        return None
    rates, means, losses = columns
    lines = [Series("", [Dot(*pair) for pair in zip(rates, held, strict=False)]) for held in (means, losses)]
    suggestion = stage.result.get("suggestion")
    mark = suggestion if given(suggestion) else None
    drawing = plot(lines, Quantity("learning rate", log=True), Quantity("loss"), "Loss over the learning rate", mark)
    return {
        "title": "Loss over the learning rate",
        "unit": "nats",
        "final": stage.result.get("lowest_lr"),
        "of": "lowest at",
        "drawing": drawing,
        "broad": True,
        "remark": "blue: mean of neighbouring steps; orange: every step" + ("; dashed: the suggestion" if mark else ""),
    }


def _over_distance(stage: StageFiles) -> Json | None:
    """Reward and measure of held-out replies over the distance from the parent: where they part, the reward is fooled.

    The form of "Scaling Laws for Reward Model Overoptimization", arXiv 2210.10760: over the root of the KL.
    """
    held = [row for row in stage.rows if row.get("split") == "eval" and given(row.get("objective/kl_k1"))]
    if len(held) < MIN_LOOKS:
        return None
    lines = []
    for key, name in (("objective/score_shaped", "reward"), ("gold/score", "gold")):
        dots = [Dot(max(0.0, row["objective/kl_k1"]) ** 0.5, row[key]) for row in held if given(row.get(key))]
        lines += [Series(name, dots)] if dots else []
    title = "Held out, over the distance from the parent"
    return {
        "title": title,
        "unit": "reward before the KL penalty" + (" and gold score" if len(lines) > 1 else ""),
        "final": held[-1].get("objective/score_shaped"),
        "of": "last",
        "drawing": plot(lines, Quantity("root of KL"), Quantity("score"), f"{title}, {stage.name}"),
        "broad": True,
        "remark": "every dot is a look; blue: reward" + ("; orange: gold" if len(lines) > 1 else ""),
    }


def evaluations(stage: StageFiles) -> Json:
    """The held-out numbers by step {columns, rows, left_out}: the dots of the curves, as a table."""
    rows = {row["step"]: row for row in stage.rows if row.get("split") == "eval" and given(row.get("step"))}
    keys = list(dict.fromkeys(key for row in rows.values() for key in row if given(row[key]) and key != "step"))
    kept = [rows[step] for step in sorted(rows)]
    cut = kept if len(kept) <= MOST_ROWS else [*kept[: MOST_ROWS // 2], *kept[-MOST_ROWS // 2 :]]
    return {"columns": keys, "rows": cut, "left_out": len(kept) - len(cut)}
