"""Damaged replies: what a reward model must learn to reject whatever the style."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Draw = Callable[..., float]


def truncated(words: list[str], asked: str, draw: Draw) -> str:
    """Cut off in the middle."""
    return " ".join(words[: max(1, round(len(words) * (0.3 + 0.4 * draw("cut"))))])


def repeated(words: list[str], asked: str, draw: Draw) -> str:
    """One word said two to four times more."""
    place = int(draw("place") * len(words))
    times = 2 + int(draw("times") * 3)
    return " ".join(words[:place] + [words[place]] * times + words[place:])


def shuffled(words: list[str], asked: str, draw: Draw) -> str:
    """All words, in another order."""
    order = sorted(range(len(words)), key=lambda number: draw("shuffle", number))
    return " ".join(words[number] for number in order)


def _nothing(words: list[str], asked: str, draw: Draw) -> str:
    """Next to nothing."""
    return ("", ".", "...", words[0])[int(draw("nothing") * 4)]


def _echo(words: list[str], asked: str, draw: Draw) -> str:
    """The question again."""
    return asked


DAMAGES: tuple[Callable[[list[str], str, Draw], str], ...] = (truncated, repeated, shuffled, _nothing, _echo)


def damaged(answer: str, asked: str, answers: Sequence[str], draw: Draw) -> str:
    """`answer`, damaged in one of five ways: cut off, a word repeated, shuffled, next to nothing, the question echoed.

    Args:
        answer: the good reply, not empty.
        asked: the question.
        answers: every good answer of the row; the result is none of them.
        draw: a number in [0, 1) for any key.
    """
    good = {" ".join(text.split()) for text in answers} | {" ".join(answer.split())}
    first = int(draw("kind") * len(DAMAGES))
    for step in range(len(DAMAGES)):
        result = DAMAGES[(first + step) % len(DAMAGES)](answer.split(), asked, draw)
        if " ".join(result.split()) not in good:
            return result
    return ""
