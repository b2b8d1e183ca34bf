"""contradictory: drops pairs whose prompt and replies also stand there with the preference the other way round.

All of them go, as nothing says which one is right (`contradictory`). Reads all pairs before it yields the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from data_prep.quality.pair_bias import direction
from data_prep.records.filter import FILTERS, Filter
from data_prep.sources.rows import Skip
from data_prep.types import PREFERENCE


@FILTERS.register("contradictory")
@dataclass
class Contradictory(Filter):
    """Drops pairs that are also preferred the other way round."""

    kinds = (PREFERENCE,)

    def through(self, records: Iterable[Any]) -> Iterator[Any]:
        """The pairs that nothing contradicts."""
        pairs = list(records)
        seen = {direction(pair) for pair in pairs}
        for pair in pairs:
            compared, first = direction(pair)
            yield Skip("contradictory") if (compared, not first) in seen else pair
