"""Drawings of the report as inline SVG: curves, intervals, bars, histograms, calibration, and the rail of a chain.

Colours and type come from the page's style sheet (by class), so that a drawing follows light, dark and print. Every
function returns `Markup`: complete elements whose only text is numbers and escaped labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from align.report.axes import Axis, axis_over
from align.report.formatting import MINUS, number, percent
from align.report.run_files import Point
from reward.metrics import accuracy_interval

WIDTH, HEIGHT = 320, 156
LEFT, RIGHT, TOP, BOTTOM = 42, 10, 8, 22
MOST_POINTS = 150
SMOOTH_FROM = 40
"""Points from which on a curve is drawn as a moving mean over its raw values."""


def frame(size: tuple[int, int], title: str, text: str, parts: Sequence[str], stretched: bool = False) -> Markup:
    """An `<svg>` of width and height in its own units, with a title and a description for those who cannot see it."""
    fit = ' class="bar" preserveAspectRatio="none"' if stretched else ""
    opening = f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img"{fit}><title>{escape(title)}</title>'
    described = f"<desc>{escape(text)}</desc>" if text else ""
    return Markup(opening + described + "".join(parts) + "</svg>")


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most twice `most` points that keep every extreme: the lowest and the highest of each run of neighbours."""
    if len(points) <= 2 * most:
        return list(points)
    every = math.ceil(len(points) / most)
    kept: list[Point] = []
    for start in range(0, len(points), every):
        group = points[start : start + every]
        ends = {group.index(min(group, key=lambda p: p[1])), group.index(max(group, key=lambda p: p[1]))}
        kept += [group[i] for i in sorted(ends)]
    return kept


def smoothed(points: Sequence[Point], most: int = MOST_POINTS) -> tuple[list[Point], int]:
    """(moving means over `window` neighbours at no more than `most` steps, window); window 1: too few to smooth."""
    if len(points) < SMOOTH_FROM:
        return list(points), 1
    window = max(3, len(points) // 20)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    stride = max(1, math.ceil(len(points) / most))
    places = sorted({*range(0, len(points), stride), len(points) - 1})
    means = []
    for i in places:
        start, end = max(0, i - window // 2), min(len(points), i - window // 2 + window)
        means.append((points[i][0], (sums[end] - sums[start]) / (end - start)))
    return means, window


class Plane:
    """The plane of a curve: steps from left to right, values between round marks."""

    def __init__(self, values: Sequence[float], end: float, unit: str = "step") -> None:
        self.x = Axis(0.0, end or 1.0, LEFT, WIDTH - RIGHT)
        self.y = axis_over(values, HEIGHT - BOTTOM, TOP, about=3)
        self.unit = unit

    def place(self, point: Point) -> tuple[float, float]:
        """A point in units of the drawing."""
        return self.x.at(point[0]), self.y.at(point[1])

    def grid(self) -> list[str]:
        """Lines and labels of both axes."""
        step = self.y.marks[1] - self.y.marks[0]
        digits = max(0, -math.floor(math.log10(step) + 1e-9)) + _quarter(step)
        parts = []
        for mark in self.y.marks:
            y = self.y.at(mark)
            text = number(mark) if digits > 4 or abs(mark) >= 1e6 else f"{mark:,.{digits}f}".replace("-", MINUS)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:g}" y2="{y:g}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:g}" text-anchor="end">{text}</text>')
        for at, anchor in ((0.0, "start"), (self.x.high, "end")):
            text = f"{self.unit} {number(round(at))}" if at else "0"
            parts.append(f'<text x="{self.x.at(at):g}" y="{HEIGHT - 5}" text-anchor="{anchor}">{text}</text>')
        return parts

    def line(self, points: Sequence[Point], kind: str) -> str:
        """A polyline of a class of the style sheet."""
        path = " ".join(f"{x:g},{y:g}" for x, y in map(self.place, points))
        return f'<polyline class="{kind}" points="{path}"/>'

    def dot(self, point: Point, kind: str, radius: float = 2.8) -> str:
        """A point that says its step and value when pointed at."""
        x, y = self.place(point)
        says = f"{self.unit} {number(round(point[0]))}: {number(point[1])}"
        return f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="{radius}"><title>{says}</title></circle>'


def _quarter(step: float) -> int:
    """1 where marks are 2.5 (times a power of ten) apart and so need one digit more, else 0."""
    return int(abs(step / 10.0 ** math.floor(math.log10(step) + 1e-9) - 2.5) < 1e-6)


def curve(
    line: Sequence[Point],
    dots: Sequence[Point],
    title: str,
    floor: float | None = None,
    beside: Sequence[Point] = (),
    unit: str = "step",
) -> Markup:
    """A metric over steps: training (line), evaluations (dots), and a second metric beside it (dashed line).

    Long lines are drawn as moving means over their faint raw values, of which every extreme is kept. Values below
    `floor` are drawn at it.
    """
    bound = -math.inf if floor is None else floor
    line, dots, beside = ([(x, max(y, bound)) for x, y in points] for points in (line, dots, beside))
    means, window = smoothed(line)
    raw, second = thin(line), smoothed(beside)[0]
    shown = [*raw, *thin(dots), *second]
    plane = Plane([y for _, y in shown], max(x for x, _ in shown), unit)
    parts = plane.grid()
    if second:
        parts.append(plane.line(second, "beside"))
    if len(line) > 1:
        parts += [plane.line(raw, "raw")] if window > 1 else []
        parts.append(plane.line(means, "train"))
    if line:
        parts.append(plane.dot(line[-1], "last"))
    if len(dots) > 1:
        parts.append(plane.line(thin(dots), "through"))
    parts += [plane.dot(point, "held") for point in thin(dots, 40)]
    return frame((WIDTH, HEIGHT), title, _told(line or dots, unit), parts)


def _told(points: Sequence[Point], unit: str) -> str:
    """A curve in words."""
    if not points:
        return ""
    low, high = (choose(points, key=lambda p: p[1]) for choose in (min, max))
    return (
        f"{number(points[0][1])} at {unit} {number(round(points[0][0]))}, {number(points[-1][1])} at {unit} "
        f"{number(round(points[-1][0]))}; between {number(low[1])} and {number(high[1])}"
    )


ROW = 96
"""Height of a rail's row in its own units; the style sheet gives each row of text the same height."""


def interval(value: float, low: float, high: float, ends: tuple[float, float], mark: float | None) -> Markup:
    """A value with its interval on an axis between two ends; `mark` is the value that means "no difference"."""
    width, height, edge = 160, 16, 4
    axis = Axis(*ends, edge, width - edge)

    def place(at: float) -> float:
        return axis.at(min(max(at, axis.low), axis.high))

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
    across, up = Axis(0.5, 1.0, left, width - right), Axis(low, 1.0, height - foot, top)

    def place(confidence: float, accuracy: float) -> tuple[float, float]:
        return across.at(confidence), up.at(max(accuracy, low))

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
