"""Which sources serve a kind of rows: one, or those of a mixture."""

from __future__ import annotations

from dataclasses import dataclass, fields

from data_prep.errors import UserError
from data_prep.options import DataOptions, MixOptions, SourceOptions
from data_prep.reading import Given, source_for
from data_prep.typed import build


@dataclass(frozen=True)
class Source:
    """One source of a mixture, or the only source (`name` None)."""

    name: str | None
    given: Given
    weight: float = 1.0
    epochs: float | None = None


def sources_for(data: DataOptions, kind: str) -> list[Source]:
    """The sources of one kind of rows, sorted by name.

    Raises:
        UserError: nothing is given, or a mixture's options are wrong.
    """
    given = source_for(data, kind)
    if not given.mix:
        return [Source(None, given)]
    own = {each.name for each in fields(SourceOptions)}
    found = []
    for name, values in sorted(given.mix.items()):
        where = f"{given.where}.{name}"
        options = build(MixOptions, values, where)
        if bool(options.path) == bool(options.generator):
            raise UserError(
                "expected a path or a generator (got " + ("both)" if options.path else "neither)"),
                field=where,
                code="mix",
            )
        if options.mix:
            raise UserError("a source of a mixture cannot be a mixture itself", field=f"{where}.mix", code="mix")
        if options.epochs is not None and options.weight != 1.0:
            raise UserError(
                "give either a weight or epochs: epochs fix how often each row is drawn", field=where, code="mix"
            )
        source = SourceOptions(**{key: getattr(options, key) for key in own})
        found.append(Source(str(name), Given(data, source, option=f"{where}."), options.weight, options.epochs))
    return found
