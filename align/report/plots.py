"""Plots with axes, as inline SVG: points and lines over a number, and dots over names.

Colours and type come from the page's style sheet (classes `s0` to `s5` for series), so that a plot follows light, dark
and print. Series differ in the shape of their marks as well. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise

from markupsafe import Markup, escape

from align.report.axes import axis_over
from align.report.formatting import MINUS

WIDTH, HEIGHT = 520, 310
RIGHT, TOP, BOTTOM = 12, 36, 58
INSET = 22
"""From the ends of the frame to the first and last mark of the axis below, so that its numbers keep off the others."""
ROW = 52
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
class Quantity:
    """What is along an axis, and whether the axis is logarithmic."""

    title: str
    log: bool = False


def spans_decades(values: Sequence[float]) -> bool:
    """Whether an axis of these values should be logarithmic: all positive, and a factor of ten or more apart."""
    return min(values) > 0 and max(values) / min(values) >= 10


def coincide(series: Sequence[Series]) -> bool:
    """Whether marks of two series stand at one x, where one could hide the other."""
    return any(one.x == other.x for a, b in combinations(series, 2) for one in a.dots for other in b.dots)


def plot(
    series: Sequence[Series], x: Quantity, y: Quantity, label: str, mark: float | None = None, apart: bool = False
) -> Markup:
    """Series over a number; `mark` is an x worth a line of its own.

    apart: each series is moved sideways by a few units, so that marks at one x stand side by side.
    """
    dots = [dot for each in series for dot in each.dots]
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    rows = axis_over([end for dot in dots for end in _ends(dot)], floor, TOP, log=y.log)
    left = 12 + max(room(_tick(value)) for value in rows.marks)
    values = [dot.x for dot in dots] + ([mark] if mark is not None else [])
    columns = axis_over(values, left + INSET, right - INSET, log=x.log)
    parts = []
    for value in rows.marks:
        height = rows.at(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{height}" y2="{height}"/>')
        parts.append(f'<text x="{left - 8}" y="{height}" dy=".34em" text-anchor="end">{_tick(value)}</text>')
    parts += _ticks(columns.marks, [columns.at(value) for value in columns.marks], (floor, floor + 4))
    parts.append(_title((left + right) / 2, HEIGHT, x.title))
    parts.append(f'<text class="axis" x="0" y="{TOP - 20}">{escape(y.title)}</text>')
    if mark is not None:
        across = columns.at(mark)
        parts.append(f'<line class="mark at" x1="{across}" x2="{across}" y1="{TOP}" y2="{floor}"/>')
    shifts = _shifts(len(series), [columns.at(dot.x) for dot in dots]) if apart else [0.0] * len(series)
    paths = [_means(each.dots) if each.line else [] for each in series]
    marks, whiskers = [], []
    for index, (each, path, shift) in enumerate(zip(series, paths, shifts, strict=True)):
        colour = f"s{index % COLOURS}"
        if len(path) > 1:
            points = " ".join(f"{columns.at(a) + shift:g},{rows.at(b):g}" for a, b in path)
            parts.append(f'<polyline class="{colour} joined"{_dashes(paths, index)} points="{points}"/>')
        for dot in each.dots:
            across, height = round(columns.at(dot.x) + shift, 1), rows.at(dot.y)
            if dot.low is not None and dot.high is not None:
                bottom, top = rows.at(dot.low), rows.at(dot.high)
                parts.append(f'<line class="{colour} whisker" x1="{across}" x2="{across}" y1="{bottom}" y2="{top}"/>')
                whiskers.append((across - 2, top, across + 2, bottom))
            if len(each.dots) <= 60:  # more are a curve: the line says it
                parts.append(_shape(index, across, height, colour, dot.title))
                marks.append(Mark(across, height, colour, dot.label))
    parts += [
        f'<text class="{each.colour} told" x="{each.x:g}" y="{each.y:g}" text-anchor="{each.anchor}">'
        f"{escape(each.text)}</text>"
        for each in beside(marks, whiskers, (left, 0.0, WIDTH, floor))
    ]
    return _svg(WIDTH, HEIGHT, label, parts)


def _shifts(count: int, places: Sequence[float]) -> list[float]:
    """How far each series moves sideways: at most 10 units from the next, and never as far as another x."""
    gaps = [b - a for a, b in pairwise(sorted(places)) if b - a > 10]
    step = min(10.0, 0.6 * min(gaps, default=WIDTH) / max(1, count - 1))
    return [round((index - (count - 1) / 2) * step, 1) for index in range(count)]


def _dashes(paths: Sequence[Sequence[tuple[float, float]]], index: int) -> str:
    """Alternating dashes for series whose lines are one, so that each colour shows."""
    same = [i for i, path in enumerate(paths) if path == paths[index]]
    if len(same) == 1:
        return ""
    return f' stroke-dasharray="8 {8 * (len(same) - 1)}" stroke-dashoffset="{-8 * same.index(index)}"'


def _ends(dot: Dot) -> list[float]:
    """The heights that a dot and its interval take."""
    return [end for end in (dot.low, dot.y, dot.high) if end is not None]


def dot_chart(rows: Sequence[tuple[str, Sequence[Dot]]], along: Quantity, label: str) -> Markup:
    """Values by name, the name over its values; the values are the dots' y. Dots of one name stand below each other."""
    dots = [dot for _, each in rows for dot in each]
    axis = axis_over([end for dot in dots for end in _ends(dot)], 2 * INSET, WIDTH - 2 * INSET, log=along.log)
    height = ROW * len(rows) + BOTTOM
    parts = _ticks(axis.marks, [axis.at(mark) for mark in axis.marks], (0, height - BOTTOM))
    parts.append(_title(WIDTH / 2, height, along.title))
    for index, (name, each) in enumerate(rows):
        most = int(WIDTH / CHARACTER)
        shown = name if len(name) <= most else f"{name[: most - 1]}\N{HORIZONTAL ELLIPSIS}"
        parts.append(f'<text class="axis told" x="0" y="{ROW * index + 17}">{escape(shown)}</text>')
        for place, dot in enumerate(each):
            y = round(ROW * index + 35 + (place - (len(each) - 1) / 2) * min(6.0, 18 / len(each)), 1)
            if dot.low is not None and dot.high is not None:
                ends = f'x1="{axis.at(dot.low)}" x2="{axis.at(dot.high)}" y1="{y}" y2="{y}"'
                parts.append(f'<line class="s0 whisker" {ends}/>')
            parts.append(_shape(0, axis.at(dot.y), y, "s0", dot.title))
    return _svg(WIDTH, height, label, parts)


def _ticks(values: Sequence[float], places: Sequence[float], ends: tuple[float, float]) -> list[str]:
    """The marks of the axis below, each a line between two heights, and as many of their numbers as there is room for.

    The numbers hang below the lowest number of the axis at the left, also where the page makes type larger.
    """
    texts = [_tick(value) for value in values]
    tens = [value > 0 and math.log10(value).is_integer() for value in values]
    parts = []
    for text, place, shown in zip(texts, places, without_overlap(places, texts, tens), strict=True):
        parts.append(f'<line class="grid" x1="{place}" x2="{place}" y1="{ends[0]}" y2="{ends[1]}"/>')
        if shown:
            parts.append(f'<text x="{place}" y="{ends[1] + 7}" dy=".75em" text-anchor="middle">{text}</text>')
    return parts


def _title(middle: float, height: float, title: str) -> str:
    """The title of the axis below."""
    return f'<text class="axis" x="{middle}" y="{height - 6}" text-anchor="middle">{escape(title)}</text>'


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


CHARACTER, LINE = 11.0, 21.0
"""Room of a character and of a line in the largest type a plot is shown in, that of a narrow screen."""
NEAR = 14.0
MOST_JOINED = 4

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Mark:
    """A mark at (x, y), the class of its colour, and the text that belongs beside it ("" for none)."""

    x: float
    y: float
    colour: str
    text: str


@dataclass(frozen=True)
class Label:
    """A text, where it begins (`anchor` start) or ends (`anchor` end), and the class of its colour."""

    x: float
    y: float
    anchor: str
    text: str
    colour: str


def room(text: str) -> float:
    """The width that a text may take."""
    return CHARACTER * len(text)


def without_overlap(places: Sequence[float], texts: Sequence[str], first: Sequence[bool]) -> list[bool]:
    """Which of the texts, each centred at its place along a line, are written; those marked `first` have precedence."""
    kept: list[int] = []
    for i in sorted(range(len(places)), key=lambda i: not first[i]):
        if all(abs(places[i] - places[j]) >= (room(texts[i]) + room(texts[j])) / 2 + CHARACTER / 2 for j in kept):
            kept.append(i)
    return [i in kept for i in range(len(places))]


def beside(marks: Sequence[Mark], whiskers: Sequence[Box], frame: Box) -> list[Label]:
    """Labels inside the frame (left, top, right, bottom), none over a mark or another label where there is room.

    Where there is more room, none is over a whisker either.

    Marks of one colour that nearly touch share a label: "0.02, 0.05".
    """
    taken = [(mark.x - 5, mark.y - 5, mark.x + 5, mark.y + 5) for mark in marks]
    labels = []
    for mark in _joined(marks):
        choices = [
            Label(mark.x + side * 9, mark.y + down, "start" if side > 0 else "end", mark.text, mark.colour)
            for line in range(10)
            for down in (-10 - line * LINE, 24 + line * LINE)
            for side in (1, -1)
        ]
        inside = [choice for choice in choices if _inside(_box(choice), frame)]
        free = [choice for choice in inside if not any(_overlap(_box(choice), box) for box in taken)]
        clear = [choice for choice in free if not any(_overlap(_box(choice), box) for box in whiskers)]
        labels.append([*clear, *free, *choices][0])
        taken.append(_box(labels[-1]))
    return labels


def _joined(marks: Sequence[Mark]) -> list[Mark]:
    """One mark with all their texts for those of a colour that lie near the first of them."""
    groups: list[list[Mark]] = []
    for mark in marks:
        for group in groups:
            near = max(abs(mark.x - group[0].x), abs(mark.y - group[0].y)) <= NEAR
            if near and mark.colour == group[0].colour:
                group.append(mark)
                break
        else:
            groups.append([mark])
    found = []
    for group in groups:
        texts = list(dict.fromkeys(mark.text for mark in group if mark.text))
        told = ", ".join(texts) if len(texts) <= MOST_JOINED else f"{texts[0]} to {texts[-1]}"
        found.append(replace(group[0], text=told))
    return [mark for mark in found if mark.text]


def _box(label: Label) -> Box:
    left = label.x if label.anchor == "start" else label.x - room(label.text)
    return left, label.y - 16, left + room(label.text), label.y + 4


def _inside(box: Box, frame: Box) -> bool:
    return box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
