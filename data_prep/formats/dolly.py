"""dolly: {"instruction", "context", "response", "category"} (databricks/databricks-dolly-15k).

A non-empty `context` follows the instruction after a blank line.
"""

from __future__ import annotations

from data_prep.formats.alpaca import SYSTEM, Alpaca
from data_prep.formats.base import FORMATS


@FORMATS.register("dolly")
class Dolly(Alpaca):
    """One instruction, an optional context, one response."""

    spellings = (("instruction", "context", "response"), ("instruction", "context", "output"))
    extras = ("category", "history", *SYSTEM)
    about = "context"
    answers = ("response", "output")
