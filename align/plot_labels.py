"""Where the words of a plot stand so that none lies on another: ticks that are left out, labels beside marks.

Sizes are in the plot's own units. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
