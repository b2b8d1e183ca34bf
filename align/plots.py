"""Plots with axes, as inline SVG: points and lines over a number, and dots over names.

Colours and type come from the page's style sheet (classes `s0` to `s5` for series), so that a plot follows light, dark
and print. Series differ in the shape of their marks as well. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from align.svg import ticks
from align.words import MINUS

WIDTH, HEIGHT = 520, 290
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 30, 46
ROW, NAMES_WIDTH = 30, 190
COLOURS = 6
"""Classes s0 to s5; further series begin again with the first."""


@dataclass(frozen=True)
class Dot:
    """A measured value, with its 95 % interval where there is one and a text shown on hovering."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    title: str = ""
    label: str = ""
    """Written beside the mark."""


@dataclass(frozen=True)
class Series:
    """Dots of one colour; `line` joins the means of the dots at each x."""

    name: str
    dots: Sequence[Dot] = field(default_factory=list)
    line: bool = True


@dataclass(frozen=True)
class Axis:
    """What is along an axis, and whether it is logarithmic."""

    title: str
    log: bool = False

    def scale(self, values: Sequence[float]) -> tuple[list[float], float, float]:
        """(marks, low, high) of an axis that holds these values."""
        low, high = min(values), max(values)
        if not self.log:
            marks = ticks(low, high, 4)
            return marks, marks[0], marks[-1]
        low, high = math.log10(low), math.log10(high)
        pad = 0.04 * (high - low) or 0.3
        steps = (1, 2, 5) if high - low < 2.2 else (1,)
        every = max(1, math.ceil((high - low) / 8))
        powers = range(math.floor(low - pad), math.ceil(high + pad) + 1, every)
        marks = [m * 10.0**p for p in powers for m in steps if low - pad <= math.log10(m * 10.0**p) <= high + pad]
        return marks, low - pad, high + pad

    def place(self, value: float) -> float:
        """Where a value stands, in the units of `scale`."""
        return math.log10(value) if self.log else value


def spans_decades(values: Sequence[float]) -> bool:
    """Whether an axis of these values should be logarithmic: all positive, and a factor of ten or more apart."""
    return min(values) > 0 and max(values) / min(values) >= 10


def plot(series: Sequence[Series], x: Axis, y: Axis, label: str, mark: float | None = None) -> Markup:
    """Series over a number; `mark` is an x worth a line of its own."""
    dots = [dot for each in series for dot in each.dots]
    xs, x_low, x_high = x.scale([dot.x for dot in dots] + ([mark] if mark is not None else []))
    ends = [end for dot in dots for end in (dot.low, dot.y, dot.high) if end is not None]
    ys, y_low, y_high = y.scale(ends)
    floor = HEIGHT - BOTTOM

    def at(dot_x: float, dot_y: float) -> tuple[float, float]:
        across = (x.place(dot_x) - x_low) / ((x_high - x_low) or 1.0)
        up = (y.place(dot_y) - y_low) / ((y_high - y_low) or 1.0)
        return round(LEFT + across * (WIDTH - LEFT - RIGHT), 1), round(floor - up * (floor - TOP), 1)

    parts = []
    for value in ys:
        height = at(dots[0].x, value)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height}" y2="{height}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{height + 4}" text-anchor="end">{_tick(value)}</text>')
    for value in xs:
        across = at(value, ys[0])[0]
        parts.append(f'<line class="grid" x1="{across}" x2="{across}" y1="{floor}" y2="{floor + 4}"/>')
        parts.append(f'<text x="{across}" y="{floor + 17}" text-anchor="middle">{_tick(value)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x.title)}</text>')
    parts.append(f'<text class="axis" x="0" y="{TOP - 16}">{escape(y.title)}</text>')
    if mark is not None:
        across = at(mark, ys[0])[0]
        parts.append(f'<line class="mark at" x1="{across}" x2="{across}" y1="{TOP}" y2="{floor}"/>')
    for index, each in enumerate(series):
        colour = f"s{index % COLOURS}"
        if each.line and len({dot.x for dot in each.dots}) > 1:
            joined = " ".join(f"{a:g},{b:g}" for a, b in (at(*point) for point in _means(each.dots)))
            parts.append(f'<polyline class="{colour} joined" points="{joined}"/>')
        for dot in each.dots:
            across, height = at(dot.x, dot.y)
            if dot.low is not None and dot.high is not None:
                bottom, top = at(dot.x, dot.low)[1], at(dot.x, dot.high)[1]
                parts.append(f'<line class="{colour} whisker" x1="{across}" x2="{across}" y1="{bottom}" y2="{top}"/>')
            if len(each.dots) <= 60:  # more are a curve: the line says it
                parts.append(_shape(index, across, height, colour, dot.title))
            if dot.label:
                parts.append(f'<text x="{across + 8}" y="{height - 6}">{escape(dot.label)}</text>')
    return _svg(WIDTH, HEIGHT, label, parts)


def dot_chart(rows: Sequence[tuple[str, Sequence[Dot]]], axis: Axis, label: str) -> Markup:
    """Values by name, one row each; the values are the dots' y."""
    dots = [dot for _, each in rows for dot in each]
    marks, low, high = axis.scale([end for dot in dots for end in (dot.low, dot.y, dot.high) if end is not None])
    height = TOP + ROW * len(rows) + BOTTOM

    def across(value: float) -> float:
        share = (axis.place(value) - low) / ((high - low) or 1.0)
        return round(NAMES_WIDTH + share * (WIDTH - NAMES_WIDTH - RIGHT), 1)

    parts = []
    for mark in marks:
        at = across(mark)
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(f'<text x="{at}" y="{height - BOTTOM + 17}" text-anchor="middle">{_tick(mark)}</text>')
    middle = (NAMES_WIDTH + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{height - 6}" text-anchor="middle">{escape(axis.title)}</text>')
    for index, (name, each) in enumerate(rows):
        y = TOP + ROW * index + ROW / 2
        shown = name if len(name) <= 34 else f"{name[:33]}\N{HORIZONTAL ELLIPSIS}"
        parts.append(f'<text class="axis" x="{NAMES_WIDTH - 12}" y="{y + 4}" text-anchor="end">{escape(shown)}</text>')
        for dot in each:
            if dot.low is not None and dot.high is not None:
                ends = f'x1="{across(dot.low)}" x2="{across(dot.high)}" y1="{y}" y2="{y}"'
                parts.append(f'<line class="s0 whisker" {ends}/>')
            parts.append(_shape(0, across(dot.y), y, "s0", dot.title))
    return _svg(WIDTH, height, label, parts)


def _tick(value: float) -> str:
    """A round number in as few digits as it needs."""
    if 1e-4 <= abs(value) < 1e6 or value == 0:
        text = f"{value:,.10g}"
    else:
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        text = f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return text.replace("-", MINUS)


def _means(dots: Sequence[Dot]) -> list[tuple[float, float]]:
    """The mean of the dots at each x, in order."""
    at: dict[float, list[float]] = {}
    for dot in dots:
        at.setdefault(dot.x, []).append(dot.y)
    return [(x, sum(ys) / len(ys)) for x, ys in sorted(at.items())]


def key(index: int) -> Markup:
    """The mark of a series, for a legend in text."""
    return Markup(f'<svg class="key" viewBox="0 0 12 12">{_shape(index, 6, 6, f"s{index % COLOURS}", "")}</svg>')


def _shape(index: int, x: float, y: float, colour: str, title: str) -> str:
    """A mark: circle, square, triangle or diamond by the number of the series."""
    r = 4.2
    outlines = (
        f"M{x - r} {y}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0Z",
        f"M{x - 3.8} {y - 3.8}h7.6v7.6h-7.6Z",
        f"M{x} {y - 5}l4.8 8.4h-9.6Z",
        f"M{x} {y - 5.4}l5.4 5.4l-5.4 5.4l-5.4 -5.4Z",
    )
    told = f"<title>{escape(title)}</title>" if title else ""
    return f'<path class="{colour} dot" d="{outlines[index % len(outlines)]}">{told}</path>'


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> Markup:
    opening = f'<svg class="plot" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
    return Markup(opening + "".join(parts) + "</svg>")
