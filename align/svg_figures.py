"""The smaller drawings of a report: an interval, bars, calibration, and the rail that joins the links of a chain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from align.svg import frame
from align.words import number, percent
from reward.metrics import accuracy_interval

ROW = 96
"""Height of a rail's row in its own units; the style sheet gives each row of text the same height."""


def interval(value: float, low: float, high: float, axis: tuple[float, float], mark: float | None) -> Markup:
    """A value with its interval on an axis; `mark` is the value that means "no difference"."""
    width, height, edge = 160, 16, 4

    def place(at: float) -> float:
        share = (min(max(at, axis[0]), axis[1]) - axis[0]) / ((axis[1] - axis[0]) or 1.0)
        return round(edge + share * (width - 2 * edge), 1)

    parts = [f'<line class="grid" x1="{edge}" x2="{width - edge}" y1="8" y2="8"/>']
    if mark is not None:
        parts.append(f'<line class="mark" x1="{place(mark)}" x2="{place(mark)}" y1="2" y2="14"/>')
    parts.append(f'<line class="band" x1="{place(low)}" x2="{place(high)}" y1="8" y2="8"/>')
    parts.append(f'<circle class="value" cx="{place(value)}" cy="8" r="3.6"/>')
    return frame((width, height), f"{number(value)}, between {number(low)} and {number(high)}", "", parts)


def bar(share: float, title: str) -> Markup:
    """A share of a whole, as the filled part of a line."""
    width = round(200 * min(max(share, 0.0), 1.0), 1)
    parts = ['<rect class="track" width="200" height="6"/>', f'<rect class="part" width="{width:g}" height="6"/>']
    return frame((200, 6), title, percent(share), parts, stretched=True)


def histogram(counts: Sequence[float], edges: Sequence[float], title: str) -> Markup:
    """Counts between `edges` (one edge more than counts), as bars."""
    width, height, foot = 320, 86, 16
    top, each = max([*counts, 1]), width / max(1, len(counts))
    parts = []
    for i, count in enumerate(counts):
        tall = round(count / top * (height - foot - 4), 1)
        says = f"{number(edges[i])} to {number(edges[i + 1])}: {number(count)}"
        parts.append(
            f'<rect class="part" x="{i * each + 0.5:.1f}" y="{height - foot - tall:g}" '
            f'width="{max(each - 1, 0.5):.1f}" '
            f'height="{tall:g}"><title>{says}</title></rect>'
        )
    parts.append(f'<line class="mark" x1="0" x2="{width}" y1="{height - foot}" y2="{height - foot}"/>')
    for x, edge, anchor in ((0, edges[0], "start"), (width, edges[-1], "end")):
        parts.append(f'<text x="{x}" y="{height - 3}" text-anchor="{anchor}">{number(edge)}</text>')
    return frame((width, height), title, f"largest {number(max([*counts, 0]))}", parts)


def reliability(bins: Sequence[Mapping[str, float]]) -> Markup:
    """How often a reward model is right (dots, 95 % Wilson intervals) against how sure it is; pairs per bin below."""
    width, height, left, right, top, foot, tall = 320, 276, 42, 10, 8, 76, 34
    low = math.floor(4 * min([0.5, *(_wilson(b)[0] for b in bins)])) / 4

    def place(confidence: float, accuracy: float) -> tuple[float, float]:
        x = left + (confidence - 0.5) / 0.5 * (width - left - right)
        return round(x, 1), round(top + (1 - max(accuracy, low)) / (1 - low) * (height - top - foot), 1)

    parts = []
    for share in [quarter / 4 for quarter in range(round(4 * low), 5)]:
        y = place(0.5, share)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:g}" y2="{y:g}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 3.5:g}" text-anchor="end">{share:.0%}</text>')
    for share, anchor in ((0.5, "start"), (0.75, "middle"), (1.0, "end")):
        x, y = place(share, low)
        parts.append(f'<text x="{x:g}" y="{y + 15:g}" text-anchor="{anchor}">{share:.0%}</text>')
    (x1, y1), (x2, y2) = place(0.5, 0.5), place(1.0, 1.0)
    parts.append(f'<line class="ideal" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>')
    most = max([b["n"] for b in bins] or [1])
    for b in bins:
        (x, y), (_, from_y), (_, to_y) = (place(b["confidence"], at) for at in (b["accuracy"], *_wilson(b)))
        parts.append(f'<line class="mark" x1="{x:g}" x2="{x:g}" y1="{from_y:g}" y2="{to_y:g}"/>')
        says = f"sure of {percent(b['confidence'])}, right in {percent(b['accuracy'])} of {number(int(b['n']))} pairs"
        parts.append(f'<circle class="value" cx="{x:g}" cy="{y:g}" r="3.6"><title>{says}</title></circle>')
        (start, _), (end, _) = place(b["from"], 1), place(b["to"], 1)
        size = round(b["n"] / most * tall, 1)
        parts.append(
            f'<rect class="part" x="{start + 0.5:g}" y="{height - 14 - size:g}" width="{end - start - 1:.1f}" '
            f'height="{size:g}"><title>{number(int(b["n"]))} pairs</title></rect>'
        )
    parts.append(f'<text x="{left - 6}" y="{height - 14}" text-anchor="end">pairs</text>')
    title = "How often the reward model is right, by how sure it is"
    return frame((width, height), title, f"{len(bins)} bins; the dashed line is perfect calibration", parts)


def _wilson(held: Mapping[str, float]) -> tuple[float, float]:
    """95 % interval of a bin's accuracy."""
    count = int(held["n"])
    return accuracy_interval(min(held["accuracy"] * count, count), count)[1:]


@dataclass(frozen=True)
class Edge:
    """A join of a rail, from the row above to the row below; dashed for a judge rather than a parent."""

    above: int
    below: int
    dashed: bool = False


def rail(lanes: Sequence[int], edges: Sequence[Edge], hollow: Sequence[bool]) -> Markup:
    """The rail beside the rows of a chain: row i has its station in lane `lanes[i]` (0 is the main line)."""

    def place(row: int) -> tuple[int, int]:
        return 16 + 26 * lanes[row], ROW * row + 20

    parts = []
    for edge in edges:
        (x, y), (to_x, to_y) = place(edge.above), place(edge.below)
        near, far = (y, y + ROW) if lanes[edge.below] else (to_y - ROW, to_y)  # the row in which the lane changes
        middle = (near + far) / 2
        path = f"M{x} {y}V{near}C{x} {middle} {to_x} {middle} {to_x} {far}V{to_y}"
        parts.append(f'<path class="edge{" judge" if edge.dashed else ""}" d="{path}"/>')
    for row, is_hollow in enumerate(hollow):
        x, y = place(row)
        parts.append(f'<circle class="{"hollow" if is_hollow else "station"}" cx="{x}" cy="{y}" r="6"/>')
    return frame((60, ROW * len(lanes)), "How the stages stand on each other", "", parts)
