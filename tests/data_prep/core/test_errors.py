"""What an exception of a library says inside a line of ours: whole sentences, in one line."""

from __future__ import annotations

import pytest

from data_prep.core.errors import said_by, whole_sentences


@pytest.mark.parametrize(
    ("text", "most", "wanted"),
    [
        ("Cannot be found.", 400, "Cannot be found"),
        ("Two\n\tlines.  Of it.\n", 400, "Two lines. Of it"),
        ("One is told. Two is left out.", 20, "One is told […]"),
        ("One is told. Two fits.", 22, "One is told. Two fits"),
        ("version 1.2 is a word; the rest", 25, "version 1.2 is a word […]"),
        ("no end of a sentence in here", 12, "no end of a […]"),
        ("x" * 30, 10, "x" * 10 + " […]"),
        ("", 10, ""),
    ],
)
def test_a_long_text_ends_with_a_sentence(text: str, most: int, wanted: str) -> None:
    assert whole_sentences(text, most) == wanted


def test_an_exception_without_words_is_named() -> None:
    assert said_by(ValueError("odd.\nIndeed.")) == "odd. Indeed"
    assert said_by(MemoryError()) == "MemoryError"
