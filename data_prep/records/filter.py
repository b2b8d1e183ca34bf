"""What a filter is, and the filters of a recipe in their order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from data_prep.core.errors import UserError
from data_prep.core.options import build, plain
from data_prep.core.registry import Registry
from data_prep.sources.rows import Skip
from data_prep.types import RowKind

KINDS = tuple(RowKind)
FILTERS: Registry[type[Filter]]


@dataclass
class Filter:
    """One step over the records of a source, before they are split and rendered. Options are dataclass fields.

    Records of all sides go through it; a record that asks for a side has it in `meta["split"]`. A filter is made anew
    for every reading and may remember what it saw, so the same records give the same answer.

    Attributes:
        kinds: the kinds of record that it works on; others pass it by.
        notes: what it changed without dropping it, counted; goes into the data card.
    """

    name: ClassVar[str] = ""
    kinds: ClassVar[tuple[RowKind, ...]] = KINDS
    notes: Counter[str] = field(init=False, default_factory=Counter, repr=False, compare=False)

    def begin(self, root: str | None) -> None:
        """Read what the filter needs besides the records; relative paths start from `root`.

        Raises:
            UserError: it cannot be read, or does not fit the options.
        """

    def content(self, root: str | None) -> Any:
        """What decides besides the options, as JSON: hashes of files that it reads."""
        return None

    def step(self, record: Any) -> Any:
        """The record, kept or changed, or a Skip with the reason for dropping it."""
        raise NotImplementedError

    def through(self, records: Iterable[Any]) -> Iterator[Any]:
        """All records, one after another; a filter that must see all of them first overrides this."""
        return map(self.step, records)


FILTERS = Registry("filter", "data_prep.filters")


def make_filters(declared: Mapping[str, Any], kind: RowKind | None = None) -> list[Filter]:
    """The filters of `data.filters` that work on a kind of record (None: all), in the declared order.

    Raises:
        UserError: an unknown filter or option (the nearest is offered), or a value of the wrong type.
    """
    made = []
    for name, options in declared.items():
        where = f"data.filters.{name}"
        try:
            cls = FILTERS.get(str(name))
        except UserError as problem:
            problem.field = where
            raise
        one: Filter = build(cls, options, where)
        if kind is None or kind in cls.kinds:
            made.append(one)
    return made


def options_of(one: Filter) -> dict[str, Any]:
    """The options of a filter as JSON can hold them."""
    return {item.name: plain(getattr(one, item.name)) for item in fields(one) if item.init}


class Filtering:
    """Records on their way through filters, with a count of what each of them dropped.

    Args:
        filters: in their order.
        root: folder that relative paths of the filters start from.
    """

    def __init__(self, filters: list[Filter], root: str | None = None) -> None:
        self.filters = filters
        self.counts: list[dict[str, int]] = [{"in": 0, "dropped": 0} for _ in filters]
        for each in filters:
            each.begin(root)

    def through(self, records: Iterable[Any]) -> Iterator[Any]:
        """Records that every filter keeps, and a Skip for each of the others."""
        skipped: list[Skip] = []
        for each, counts in zip(self.filters, self.counts, strict=True):
            records = _kept(each, counts, records, skipped)
        for record in records:
            yield from skipped
            skipped.clear()
            yield record
        yield from skipped

    def card(self) -> list[dict[str, Any]]:
        """What each filter was asked to do and did, for the data card."""
        return [
            {"name": each.name, "options": options_of(each), **counts} | ({"notes": dict(notes)} if notes else {})
            for each, counts in zip(self.filters, self.counts, strict=True)
            for notes in [+each.notes]
        ]


def _kept(each: Filter, counts: dict[str, int], records: Iterable[Any], skipped: list[Skip]) -> Iterator[Any]:
    """What one filter keeps; what it drops goes to `skipped`."""

    def counted() -> Iterator[Any]:
        for record in records:
            counts["in"] += 1
            yield record

    for result in each.through(counted()):
        if isinstance(result, Skip):
            counts["dropped"] += 1
            skipped.append(result)
        else:
            yield result
