"""`align data stats` on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console

from align.cli.terminal import print_facts

LISTED = 5
"""Rows that are named of each sort; --json has twenty."""


def print_stats(card: dict[str, Any]) -> None:
    """Everything that was counted, wrapped to the terminal."""
    console = Console(highlight=False, emoji=False, markup=False)
    print_facts(console, card["file"], list(_file(card)))
    print_facts(console, "columns", list(_columns(card)))
    print_facts(console, "rows", list(_rows(card)))
    print_facts(console, "quality", list(_quality(card)))
    print_facts(console, "look at", [(one["row"].rpartition("/")[2], one["why"]) for one in card["worst"]])


def _file(card: dict[str, Any]) -> Iterator[tuple[str, str]]:
    rows = card["rows"]
    yield "format", f"{card['format']} ({card['evidence']})"
    yield "read as", card["kind"]
    yield "rows", f"{rows['in']:,} in, {rows['kept']:,} kept"
    yield "dropped", ", ".join(f"{count:,} {reason}" for reason, count in rows["dropped"].items()) or "none"
    yield from (("note", f"{note}: {count:,}") for note, count in card["notes"].items() if count)
    yield from (("left out", f"{one['field']}: {one['message']}; {one['hint']}") for one in card.get("left_out", ()))
    for one in card["filters"]:
        yield "filter", f"{one['name']}: {one['dropped']:,} of {one['in']:,} dropped"


def _columns(card: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, column in card["fields"].items():
        types = [f"{count:,} {word}" for word, count in column["types"].items()]
        types += [f"{column[word]:,} {word}" for word in ("empty", "missing") if column.get(word)]
        yield name, ", ".join(types)


def _rows(card: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, unit in (
        ("characters", "characters"),
        ("reply_characters", "characters of a reply"),
        ("tokens", "tokens"),
    ):
        spread = card[key]
        if spread:
            yield (
                "reply" if "reply" in key else "length",
                f"{spread['shortest']:,} to {spread['longest']:,} {unit}, mean {spread['mean']:,g}, "
                f"median {spread['median']:,} {_bars(spread['histogram']['counts'])}",
            )
    if set(card["splits"]) != {"none"}:
        yield "splits", ", ".join(f"{count:,} {side}" for side, count in card["splits"].items())
    if isinstance(card["languages"], str):
        yield "languages", f"not looked at: {card['languages']}"
    elif card["languages"]:
        guessed = ", ".join(f"{count:,} {code}" for code, count in list(card["languages"].items())[:12])
        yield "languages", f"{guessed} (of {sum(card['languages'].values()):,} rows looked at)"


def _quality(card: dict[str, Any]) -> Iterator[tuple[str, str]]:
    duplicates, leakage, pairs = card["duplicates"], card["leakage"], card["pairs"]
    yield "duplicates", _named(duplicates["exact"])
    yield "near", f"{_named(duplicates['near'])} (from {duplicates['near_from']:g} of the word pairs)"
    for name, found in (leakage or {}).items():
        yield f"leaks {name}"[:11], _named(found)
    if pairs:
        yield "pairs", f"{pairs['contradictory']:,} contradictory, {pairs['tied']:,} tied"
        chars = f"{pairs['chosen_chars']:,g} against {pairs['rejected_chars']:,g} characters"
        yield "chosen", f"longer in {100 * pairs['chosen_longer']:.1f}% of the pairs ({chars})"
    yield "refusals", _named(card["refusals"])
    yield "repetitive", _named(card["repetitive"])
    repairs = card["repairs"]
    yield "encoding", f"not looked at: {repairs}" if isinstance(repairs, str) else f"{_named(repairs)} broken"


def _named(found: dict[str, Any]) -> str:
    """A count, and the first rows that it counts without their folders."""
    first = [" ".join(word.rpartition("/")[2] for word in row.split()) for row in found.get("first", [])[:LISTED]]
    more = ", ..." if found["count"] > len(first) else ""
    return f"{found['count']:,}" + (f": {', '.join(first)}{more}" if first else "")


def _bars(counts: list[int]) -> str:
    """A histogram of one line."""
    most = max(counts)
    return "".join(" ▁▂▃▄▅▆▇█"[-(-8 * count // most)] for count in counts)
