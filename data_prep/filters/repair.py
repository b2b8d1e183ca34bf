"""repair: mends broken encodings in texts ("cafÃ©" to "café") with ftfy, and counts the rows that it changed.

Only mojibake and characters that no text should hold are mended; quotes, ligatures, widths and line ends stay as they
were written. Nothing is dropped. `align data stats` reports what it would mend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from data_prep.core.errors import UserError
from data_prep.records.filter import FILTERS, Filter
from data_prep.types import Document, Labelled, Preference


@lru_cache(maxsize=1)
def mender() -> Callable[[str], str]:
    """The function that mends a text.

    Raises:
        UserError: the package ftfy is not installed.
    """
    try:
        from ftfy import TextFixerConfig, fix_text
    except ImportError as problem:
        raise UserError(
            "repairing texts needs the package ftfy", code="missing_package", hint="pip install ftfy"
        ) from problem
    config = TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        normalization=None,
        explain=False,
    )
    return lambda text: text if text.isascii() else str(fix_text(text, config))


def repaired(record: Any) -> Any:
    """The record with mended texts; the same object where nothing was broken."""
    mend = mender()
    if isinstance(record, Document):
        changed: dict[str, Any] = {"text": mend(record.text)}
    elif isinstance(record, Preference):
        changed = {"chosen": mend(record.chosen), "rejected": mend(record.rejected)}
    else:
        changed = {"reply": mend(record.reply)} if isinstance(record, Labelled) else {}
    turns = "prompt" if isinstance(record, Preference | Labelled) else "messages"
    if not isinstance(record, Document):
        changed[turns] = tuple(replace(m, content=mend(m.content)) for m in getattr(record, turns))
    same = all(getattr(record, name) == value for name, value in changed.items())
    return record if same else replace(record, **changed)


@FILTERS.register("repair")
@dataclass
class Repair(Filter):
    """Mends broken encodings in texts."""

    def begin(self, root: str | None) -> None:
        """Find ftfy."""
        mender()

    def step(self, record: Any) -> Any:
        """The record, mended."""
        result = repaired(record)
        self.notes["rows repaired by ftfy"] += result is not record
        return result
