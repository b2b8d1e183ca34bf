"""Names on the command line of a benchmark: one that is not known is answered with the nearest, and exit code 2."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

from data_prep.core.errors import unknown


def one_of(kind: str, names: Iterable[str]) -> Callable[[str], str]:
    """The `type` of an argument that is one of these names."""
    known = list(names)

    def read(word: str) -> str:
        if word not in known:
            raise argparse.ArgumentTypeError(str(unknown(kind, word, known)))
        return word

    return read


def some_of(kind: str, names: Iterable[str]) -> Callable[[str], list[str]]:
    """The `type` of an argument that lists some of these names, with commas between them."""
    one = one_of(kind, names)
    return lambda words: [one(word.strip()) for word in words.split(",")]
