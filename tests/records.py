"""All records of a source at once."""

from __future__ import annotations

from typing import Any

from data_prep.records.stream import Given, open_stream
from data_prep.records.tally import Tally


def read_records(given: Given, kind: str, seed: int) -> tuple[list[Any], Tally, dict[str, Any]]:
    """(records, the tally with its bad rows, what the card says of the source); bad rows are only counted."""
    stream = open_stream(given, kind, seed)
    records = list(stream)
    stream.tally.check_whole()
    return records, stream.tally, stream.about()
