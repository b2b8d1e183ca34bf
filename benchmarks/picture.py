"""The picture of the README: one held-out question, answered by every stage of a run, with its scores: `make picture`.

    python benchmarks/picture.py RUN [FILE]

Nothing is computed: the texts are those that the run's evaluation kept. Of the questions that stand alone and to which
all stages reply with different words and at some length, it takes the one whose scores are nearest to the means over
all of them, so that the picture shows what is usual and not what is best. Colours follow the reader's light or dark.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import escape

from align.report.formatting import MINUS, visible
from align.report.run_files import gold_of
from align.run_record import RunRecord
from data_prep.core.files import json_lines

PLACE = Path(__file__).parents[1] / "docs" / "answers.svg"
COLUMNS, ADVANCE, LINE, SIDE = 88, 8.43, 22, 28
"""Characters of a line, the width of one, the height of a line, and the margin, in pixels."""
LONGEST = 4 * COLUMNS
STYLE = """
    text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; fill: #24292f; }
    text { white-space: pre; }
    .window { fill: #fdfcfa; stroke: #d0d7de; } .rule { stroke: #d0d7de; } .soft { fill: #6e7781; }
    .dot { fill: #d0d7de; } .name { font-weight: 600; fill: #14606e; } .track { fill: #eaeef2; } .bar { fill: #14606e; }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3; } .window { fill: #14171a; stroke: #30363d; } .rule { stroke: #30363d; }
      .soft { fill: #8d96a0; } .dot { fill: #30363d; } .name { fill: #6cc0cd; } .track { fill: #21262d; }
      .bar { fill: #6cc0cd; }
    }"""
Json = dict[str, Any]


def answers(run: Path) -> list[Json]:
    """The questions of a run's evaluation, each with every stage's reply.

    Raises:
        SystemExit: the run has no evaluation with replies.
    """
    for entry in reversed(RunRecord.open(run).finished("samples.jsonl")):
        lines = json_lines(run / entry.dir / "samples.jsonl")
        rows = [row for row in lines if isinstance(row.get("replies"), dict)]
        if rows:
            return rows
    raise SystemExit(f"{run}: no evaluation with replies; align eval {run} makes one")


def scores(reply: Json) -> tuple[float, float]:
    """Gold score and reward of a reply, 0 where there is none."""
    return gold_of(reply.get("gold")) or 0.0, float(reply.get("reward") or 0.0)


def usual(rows: list[Json]) -> Json:
    """The question whose scores are nearest to the means, gold first, among those that can be shown well, or all."""
    means = {
        name: [fmean(both) for both in zip(*(scores(row["replies"][name]) for row in rows), strict=True)]
        for name in rows[0]["replies"]
    }

    def shows(row: Json) -> bool:
        texts = [reply["text"].strip() for reply in row["replies"].values()]
        return (
            not row.get("before") and all(0 < len(text) <= LONGEST for text in texts) and len(set(texts)) == len(texts)
        )

    def distance(row: Json) -> list[float]:
        return [
            sum(abs(scores(reply)[which] - means[name][which]) for name, reply in row["replies"].items())
            for which in (0, 1)
        ]

    return min([row for row in rows if shows(row)] or rows, key=distance)


def picture(row: Json, run: str) -> str:
    """The SVG of one question and its replies, each with its scores as numbers and its gold score, if any, as a bar."""
    parts, top = [], 64.0

    def line(text: str, kind: str = "", indent: float = 0.0) -> None:
        nonlocal top
        parts.append(f'<text class="{kind}" x="{SIDE + indent:g}" y="{top:g}">{escape(visible(text))}</text>')
        top += LINE

    for part in _wrapped(f"> {row['prompt']}"):
        line(part)
    for name, reply in row["replies"].items():
        top += 14
        parts.append(_scores(reply, top))
        line(name, "name")
        for part in _wrapped(reply["text"].strip()):
            line(part)
    width, height = round(COLUMNS * ADVANCE + 2 * SIDE), round(top + 2)
    title = f"One held-out question, answered by {', '.join(row['replies'])}"
    frame = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}\n</style>",
        f'<rect class="window" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="10"/>',
        *(f'<circle class="dot" cx="{SIDE + 16 * place:g}" cy="20" r="5"/>' for place in range(3)),
        f'<text class="soft" x="{SIDE + 58}" y="25">align chat {escape(visible(run))} --compare</text>',
        f'<text class="soft" text-anchor="end" x="{width - SIDE}" y="25">a held-out question</text>',
        f'<path class="rule" d="M0 38H{width}"/>',
    ]
    return "\n".join([*frame, *parts, "</svg>\n"])


def _scores(reply: Json, top: float) -> str:
    """At the right of a stage's name: gold score with a bar, and reward."""
    gold, reward = gold_of(reply.get("gold")), reply.get("reward")
    right = SIDE + COLUMNS * ADVANCE
    said = [] if gold is None else [f"gold {gold:.2f}"]
    said += [] if reward is None else [f"reward {reward:+.2f}".replace("-", MINUS)]
    text = f'<text class="soft" text-anchor="end" x="{right:g}" y="{top:g}">{" · ".join(said)}</text>'
    if gold is None:
        return text
    start = right - 26 * ADVANCE - 120
    place = f'x="{start:g}" y="{top - 9:g}" height="8" rx="4"'
    return text + f'<rect class="track" {place} width="120"/><rect class="bar" {place} width="{120 * gold:g}"/>'


def _wrapped(text: str) -> list[str]:
    shown = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    return [part for line in shown.splitlines() for part in textwrap.wrap(line, COLUMNS) or [""]]


def main(words: list[str]) -> None:
    """Draw a run's picture."""
    if not 1 <= len(words) <= 2:
        raise SystemExit("make picture ARGS='RUN [FILE]': RUN is the folder of a run that ended with an evaluation")
    run, place = Path(words[0]), Path(words[1]) if len(words) == 2 else PLACE
    place.write_text(picture(usual(answers(run)), run.name), encoding="utf-8")
    print(place)


if __name__ == "__main__":
    main(sys.argv[1:])
