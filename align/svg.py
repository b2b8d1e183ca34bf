"""Drawings as inline SVG: the frame they share, ticks, thinning, and the curve of a metric over steps.

Colours and type come from the page's style sheet (by class), so that a drawing follows light, dark and print. Every
function returns `Markup`: complete elements whose only text is numbers and escaped labels. The other drawings are in
`svg_figures.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from align.run_files import Point
from align.words import MINUS, number

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


def ticks(low: float, high: float, about: int = 3) -> list[float]:
    """Round values that span low..high, about `about` steps apart; the first and last enclose the range."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-3):
        pad = abs(high) * 0.1 or 0.5
        low, high = low - pad, high + pad
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 0.02), math.ceil(high / step - 0.02)  # a hair outside is no step more
    digits = max(0, 12 - math.ceil(math.log10(max(abs(low), abs(high), step))))
    return [round(i * step, digits) for i in range(first, last + 1)]


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


class Axes:
    """The plane of a curve: steps from left to right, values between round marks."""

    def __init__(self, marks: Sequence[float], end: float, unit: str = "step") -> None:
        self.marks = marks
        self.end = end or 1.0
        self.unit = unit

    def place(self, point: Point) -> tuple[float, float]:
        """A point in units of the drawing."""
        low, high = self.marks[0], self.marks[-1]
        x = LEFT + point[0] / self.end * (WIDTH - LEFT - RIGHT)
        y = TOP + (high - point[1]) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    def grid(self) -> list[str]:
        """Lines and labels of both axes."""
        step = self.marks[1] - self.marks[0]
        digits = max(0, -math.floor(math.log10(step) + 1e-9)) + _quarter(step)
        parts = []
        for mark in self.marks:
            y = self.place((0, mark))[1]
            text = number(mark) if digits > 4 or abs(mark) >= 1e6 else f"{mark:,.{digits}f}".replace("-", MINUS)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:g}" y2="{y:g}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:g}" text-anchor="end">{text}</text>')
        for at, anchor in ((0.0, "start"), (self.end, "end")):
            text = f"{self.unit} {number(round(at))}" if at else "0"
            parts.append(f'<text x="{self.place((at, 0))[0]:g}" y="{HEIGHT - 5}" text-anchor="{anchor}">{text}</text>')
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
    marks = ticks(min(y for _, y in shown), max(y for _, y in shown))
    axes = Axes(marks, max(x for x, _ in shown), unit)
    parts = axes.grid()
    if second:
        parts.append(axes.line(second, "beside"))
    if len(line) > 1:
        parts += [axes.line(raw, "raw")] if window > 1 else []
        parts.append(axes.line(means, "train"))
    if line:
        parts.append(axes.dot(line[-1], "last"))
    if len(dots) > 1:
        parts.append(axes.line(thin(dots), "through"))
    parts += [axes.dot(point, "held") for point in thin(dots, 40)]
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
