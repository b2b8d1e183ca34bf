"""Several sources for one kind of rows: what is drawn of each, and in which order.

A mixture is an order of rows and nothing else, so it does not depend on workers or processes, and a row that is drawn
twice is stored once. The temperature is that of multilingual and multi-task training (arXiv 1907.05019, section 4.2;
arXiv 1910.10683, section 3.5.2): a source of n rows counts as n ** (1 / temperature).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.core.errors import UserError
from data_prep.core.options import build
from data_prep.options import DataOptions, MixOptions, SourceOptions
from data_prep.records.stream import Given, source_for
from data_prep.types import RowKind

Numbers = npt.NDArray[Any]


def draws(sizes: Sequence[int], sources: Sequence[Source], temperature: float) -> list[int]:
    """How many rows one pass draws of each source.

    A source with `epochs` gives that many times its rows. The others share as many draws as they have rows, in
    proportion to weight * rows ** (1 / temperature); rounding goes to the largest remainders, and no source gets none.
    """
    found = [round(size * (source.epochs or 0)) for size, source in zip(sizes, sources, strict=True)]
    free = [place for place, source in enumerate(sources) if source.epochs is None and sizes[place]]
    logs = np.array([np.log(sources[p].weight) + np.log(sizes[p]) / temperature for p in free])
    scores = np.exp(logs - logs.max()) if free else logs  # a low temperature would overflow as a power
    total = sum(sizes[p] for p in free)
    exact = scores / scores.sum() * total if free else scores
    whole = np.floor(exact).astype(int)
    order = np.argsort(whole - exact, kind="stable")
    whole[order[: total - int(whole.sum())]] += 1
    for place, count in zip(free, whole.tolist(), strict=True):
        found[place] = count
    return [max(1, count) if size else 0 for count, size in zip(found, sizes, strict=True)]


def drawn(
    sources: Sequence[Source], which: Numbers, train: Numbers, held: Numbers, temperature: float, seed: int
) -> tuple[Numbers, dict[str, Any]]:
    """The training rows of one pass over a mixture, and what the card says of it.

    Args:
        sources: the sources.
        which: the number of every row's source.
        train: numbers of the training rows, rising.
        held: numbers of the evaluation rows.
        temperature: 1: sources in proportion to their rows, above: more evenly.
        seed: decides which rows are drawn once more (or not at all) where the draws are no multiple of the rows.
    """
    if sources[0].name is None:
        return train, {}
    own = [train[which[train] == place] for place in range(len(sources))]
    counts = draws([len(rows) for rows in own], sources, temperature)
    orders, places, card = [], [], {}
    for place, (source, rows, count) in enumerate(zip(sources, own, counts, strict=True)):
        name = str(source.name)
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        passes, rest = divmod(count, max(1, len(rows)))
        extra = np.sort(np.random.default_rng([seed, key]).permutation(len(rows))[:rest])
        orders.append(np.concatenate([np.tile(rows, passes), rows[extra]]))
        places.append((np.arange(count) + 0.5) / max(1, count))  # spread evenly over the pass
        card[name] = {
            "source": source.given.label,
            "train_rows": len(rows),
            "eval_rows": int((which[held] == place).sum()),
            "drawn": count,
            "share": round(count / max(1, sum(counts)), 4),
            "epochs": round(count / max(1, len(rows)), 4),
        }
    order = np.concatenate(orders)[np.argsort(np.concatenate(places), kind="stable")]
    return order, {"temperature": temperature, "sources": card}


@dataclass(frozen=True)
class Source:
    """One source of a mixture, or the only source (`name` None)."""

    name: str | None
    given: Given
    weight: float = 1.0
    epochs: float | None = None


def sources_for(data: DataOptions, kind: RowKind) -> list[Source]:
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
        source.negatives = source.negatives or given.source.negatives
        found.append(Source(str(name), Given(data, source, option=f"{where}."), options.weight, options.epochs))
    return found
