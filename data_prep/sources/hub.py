"""Rows of a data set on the Hugging Face hub, read with the datasets library; code beside the data is never run."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

from data_prep.core.errors import UserError, said_by
from data_prep.sources.rows import Row, RowOrProblem
from data_prep.sources.splits import SplitWish


def read_hub(name: str, wish: SplitWish) -> Iterator[RowOrProblem]:
    """The rows of a hub data set: one of its splits.

    Without a network only what is cached is found.

    Raises:
        UserError: the hub or the data set cannot be reached, it comes as a script, or the names of its splits do
            not say which one to read.
    """
    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.ERROR)  # the client's retries would be many lines; the last word is the error below
    place, _, config = name.partition(":")
    try:
        import datasets

        found = datasets.load_dataset(place, config) if config else datasets.load_dataset(place)
    except Exception as problem:
        raise _unreachable(name, problem) from problem
    finally:
        client.setLevel(level)
    for number, value in enumerate(found[wish.of_hub(list(found), name)], start=1):
        yield Row(name, number, dict(value))


def _unreachable(name: str, problem: Exception) -> UserError:
    reason = said_by(problem)
    if "script" in reason.lower():
        return UserError(
            "this data set comes as a script, which is never run (save its rows as JSONL and give the path)",
            code="hub",
            file=name,
        )
    if "config name is missing" in reason.lower():
        listed = re.findall(r"'([^']+)'", str(problem))
        return UserError(
            f"has several configurations (expected {name}:CONFIG, CONFIG one of {', '.join(listed[:10])})",
            code="hub",
            file=name,
        )
    return UserError(f"cannot reach the hub for '{name}': {reason} (save it as JSONL and give the path)", code="hub")
