"""The scores of a report: every stage on the same held-out prompts, and how far the reward model can be believed.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import escape

from align.report.charts import reliability
from align.report.conclusion import Gain, stages_of
from align.report.formatting import visible
from align.report.run_files import Json, StageFiles, finite, given, gold_of, mapping
from data_prep.records.negatives import KINDS
from reward.gate import GIVEN
from reward.probes import PROBES

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
    return {
        **found,
        "bins": bins,
        "drawing": reliability(bins) if bins else "",
        "kinds": _by_name(found.get("by_kind"), {**KINDS, GIVEN: "the pairs of the data"}),
        "tried": _by_name(found.get("probes"), PROBES),
        "verdict": str(mapping(found.get("gate")).get("verdict") or ""),
    }


def _by_name(numbers: object, says: Mapping[str, str]) -> list[Json]:
    """Rows of a table of kinds of pair: {name, says, accuracy, low, high, n, margin}, the worst first."""
    named = [(str(name), mapping(one)) for name, one in mapping(numbers).items()]
    rows = [{**one, "name": name, "says": says.get(name, "")} for name, one in named if given(one.get("accuracy"))]
    return sorted(rows, key=lambda row: float(row["accuracy"]))


OPENING, LONGEST = 600, 12_000
"""Characters of a text that are shown, and that are at most folded behind them."""
SPREAD, PICKED, OWN = 6, 4, 8
"""Prompts spread evenly over all, best gains and worst losses each, and rows of a stage's own samples."""


class Texts:
    """Cuts texts to openings and folds, and keeps the folds of a page within `budget` bytes."""

    def __init__(self, budget: int) -> None:
        self.left = budget

    def cut(self, value: Any) -> Json:
        """{text, rest, cut}: what is shown, what is folded behind it, and how many characters are in neither."""
        text = str(value if value is not None else "")
        rest = text[OPENING : OPENING + LONGEST]
        size = len(str(escape(visible(rest))).encode("utf-8", "replace"))
        if size > self.left:
            rest = ""
        else:
            self.left -= size
        return {"text": text[:OPENING], "rest": rest, "cut": max(0, len(text) - OPENING - len(rest))}


def replies(measured: StageFiles, gain: Gain | None, texts: Texts) -> Json:
    """Groups of prompts with every stage's reply: best gains, worst losses, and some spread evenly over all.

    Data sets are often ordered by topic, so that the first few would show one topic alone.
    """
    rows = [row for row in measured.samples if isinstance(row.get("replies"), dict)]
    changes = [(_change(row, gain), row) for row in rows] if gain else []
    rose = sorted((pair for pair in changes if pair[0] > 0), key=lambda pair: -pair[0])
    fell = sorted((pair for pair in changes if pair[0] < 0), key=lambda pair: pair[0])
    picked = [row for _, row in (*rose[:PICKED], *fell[:PICKED])]
    count = SPREAD if picked else 2 * SPREAD
    others = [row for row in rows if not any(row is one for one in picked)]
    spread = [others[i * len(others) // count] for i in range(count)] if len(others) > count else others
    groups = []
    if gain:
        better = f"{gain.last} scores higher than {gain.base} on {len(rose)} of {len(rows)} prompts"
        worse = f"{gain.last} scores lower than {gain.base} on {len(fell)} of {len(rows)} prompts"
        groups += [("Replies that gained", better, rose[:PICKED]), ("Replies that lost", worse, fell[:PICKED])]
    even = f"{len(spread)} of the {'other ' if picked else ''}{len(others)} prompts, evenly spaced"
    groups.append(("Other replies" if picked else "Replies", even, [(0.0, row) for row in spread]))
    shown = [(name, says, [_row(row, texts) for _, row in part]) for name, says, part in groups if part]
    return {"groups": shown, "count": len(rows)}


def _change(row: Json, gain: Gain | None) -> float:
    """How much better the last policy's reply is than its baseline's: by gold if there is gold, else by reward."""
    if gain is None:
        return 0.0
    after, before = (mapping(row["replies"].get(name)) for name in (gain.last, gain.base))
    for key in ("gold", "reward"):
        pair = [gold_of(reply.get(key)) for reply in (after, before)]
        if pair[0] is not None and pair[1] is not None:
            return pair[0] - pair[1]
    return 0.0


def _row(row: Json, texts: Texts) -> Json:
    answers = []
    for name, reply in row["replies"].items():
        reply = mapping(reply)
        answers.append(
            {
                "stage": str(name),
                **texts.cut(reply.get("text")),
                "reward": finite(reply.get("reward")),
                "gold": gold_of(reply.get("gold")),
                "finished": reply.get("finished", True),
            }
        )
    return {**_asked(row, texts), "replies": answers}


def _asked(row: Json, texts: Texts) -> Json:
    """What a sample's replies answer: the prompt, and the messages before it with who said them."""
    held = row.get("before")
    before = [one for one in held if isinstance(one, dict)] if isinstance(held, list) else []
    return {
        "prompt": texts.cut(row.get("prompt")),
        "before": [{"role": str(one.get("role")), **texts.cut(one.get("content"))} for one in before],
    }


def own_samples(stage: StageFiles, texts: Texts) -> list[Json]:
    """The stage's samples in the same form: prompts it continued, or pairs it scored, with scores as rewards."""
    found = []
    norm = mapping(stage.checkpoint.get("reward_norm"))
    mean, std = finite(norm.get("mean")) or 0.0, finite(norm.get("std")) or 1.0
    for row in stage.samples:
        answers = []
        for key in ("reply", "chosen", "rejected"):
            held = row.get(key)
            if held is None:
                continue
            said = held if isinstance(held, dict) else {"text": held}
            score = finite(said.get("score"))
            answers.append(
                {
                    "stage": stage.name if key == "reply" else key,
                    **texts.cut(said.get("text")),
                    "reward": None if score is None else (score - mean) / std,
                    "gold": None,
                    "finished": row.get("ended", True) if key == "reply" else True,
                }
            )
        if answers:
            found.append({**_asked(row, texts), "replies": answers})
        if len(found) == OWN:
            break
    return found


def has_gold(groups: Sequence[Any]) -> bool:
    """Whether any reply shown has a gold score."""
    return any(reply["gold"] is not None for _, _, rows in groups for row in rows for reply in row["replies"])
