"""The three drawings of a report, as inline SVG: a curve, an interval, and the rail that joins the links of a chain.

Colours and type come from the page's style sheet (by class), so that a drawing follows light, dark and print. Every
function returns `Markup`: complete elements whose only text is numbers and escaped labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from align.run_files import Point
from align.words import MINUS, number

WIDTH, HEIGHT = 320, 148
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 8, 22
MOST_POINTS = 300
ROW = 84
"""Height of a rail's row in its own units; the style sheet gives each row of text the same height."""


def ticks(low: float, high: float, about: int = 3) -> list[float]:
    """Round values that span low..high, about `about` steps apart; the first and last enclose the range."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-3):
        pad = abs(high) * 0.1 or 0.5
        low, high = low - pad, high + pad
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 0.02), math.ceil(high / step - 0.02)  # a hair outside is no step more
    return [round(i * step, 12) for i in range(first, last + 1)]


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> tuple[list[Point], int]:
    """At most `most` points, each the mean of `every` neighbours: (points, every)."""
    every = max(1, math.ceil(len(points) / most))
    groups = [points[i : i + every] for i in range(0, len(points), every)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups], every


def curve(line: Sequence[Point], dots: Sequence[Point], label: str, floor: float | None = None) -> Markup:
    """A training curve (line) with its evaluations (dots) over steps; values below `floor` are drawn at it."""
    bound = -math.inf if floor is None else floor
    line = [(x, max(y, bound)) for x, y in thin(line)[0]]
    dots = [(x, max(y, bound)) for x, y in thin(dots)[0]]
    every = [*line, *dots]
    marks = ticks(min(y for _, y in every), max(y for _, y in every))
    end = max(x for x, _ in every) or 1.0

    def place(point: Point) -> tuple[float, float]:
        x = LEFT + point[0] / end * (WIDTH - LEFT - RIGHT)
        y = TOP + (marks[-1] - point[1]) / (marks[-1] - marks[0]) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    digits = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9)) + (1 if _quarter(marks) else 0)
    parts = []
    for mark in marks:
        y = place((0, mark))[1]
        text = f"{mark:,.{digits}f}".replace("-", MINUS)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">{text}</text>')
    for step, anchor in ((0.0, "start"), (end, "end")):
        x = place((step, marks[0]))[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - 5}" text-anchor="{anchor}">{number(round(step))}</text>')
    if len(line) > 1:
        path = " ".join(f"{x:g},{y:g}" for x, y in map(place, line))
        parts.append(f'<polyline class="train" points="{path}"/>')
    elif line:
        dots = [*dots, *line]
    parts += [f'<circle class="held" cx="{x:g}" cy="{y:g}" r="2.8"/>' for x, y in map(place, dots)]
    return _svg(WIDTH, HEIGHT, label, parts)


def _quarter(marks: Sequence[float]) -> bool:
    """Whether the marks are 2.5 (times a power of ten) apart and so need one digit more."""
    step = marks[1] - marks[0]
    return abs(step / 10.0 ** math.floor(math.log10(step) + 1e-9) - 2.5) < 1e-6


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
    return _svg(width, height, f"{number(value)}, between {number(low)} and {number(high)}", parts)


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
    return _svg(60, ROW * len(lanes), "how the stages stand on each other", parts)


def _svg(width: int, height: int, label: str, parts: Sequence[str]) -> Markup:
    opening = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
    return Markup(opening + "".join(parts) + "</svg>")
