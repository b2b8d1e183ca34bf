"""A file of unknown content: the kind of record that its format is made for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from data_prep.errors import UserError
from data_prep.formats.base import CONVERSATION, DOCUMENT, FORMATS, PREFERENCE, PROMPT, UNPAIRED
from data_prep.reading import Given, Stream, open_stream

KINDS = (CONVERSATION, PREFERENCE, UNPAIRED, DOCUMENT, PROMPT)


def open_any(given: Given, kinds: Sequence[str] = KINDS, seed: int = 0) -> Stream:
    """The records of a source as the first kind of `kinds` that its format yields; with all kinds, the format's own.

    Raises:
        UserError: nothing can be read, or no format knows the rows.
    """
    if given.source.format != "auto":
        form = FORMATS.get(given.source.format)
        kinds = [kind for kind in (form.kinds if tuple(kinds) == KINDS else kinds) if kind in form.kinds] or kinds
    problems: list[UserError] = []
    for kind in kinds:
        try:
            stream = open_stream(given, kind, seed)
        except UserError as problem:
            if problem.code not in ("format_kind", "unknown_format", "format"):
                raise
            problems.append(problem)
            continue
        own = stream.form.kinds[0]
        return stream if own == kind or tuple(kinds) != KINDS else open_stream(given, own, seed)
    raise next((problem for problem in problems if problem.code == "format"), problems[0])


def checked(stream: Stream) -> Iterator[Any]:
    """The records of a stream that is to be read whole.

    Raises:
        UserError: after the last one, if the file broke off or has bad rows that are not to be dropped.
    """
    yield from stream
    stream.tally.check_whole()
    stream.tally.check_bad_rows(stream.given.source.on_bad_row)
