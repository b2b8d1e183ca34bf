"""text: {"text"} (or `content`, `document`), one document per row; a plain text file gives one row per line."""

from __future__ import annotations

from typing import Any

from data_prep.formats.base import FORMATS, Format
from data_prep.formats.column_checks import meta_of, text_field
from data_prep.sources.rows import Row
from data_prep.types import DOCUMENT, Document

_NAMES = ("text", "content", "document")


@FORMATS.register("text")
class Text(Format):
    """Plain documents."""

    kinds = (DOCUMENT,)
    spellings = tuple((name,) for name in _NAMES)

    writes = DOCUMENT

    @classmethod
    def uses(cls, keys: frozenset[str]) -> frozenset[str]:
        """The text's column; rows that name a role are messages, not documents."""
        return frozenset() if "role" in keys and "text" not in keys else super().uses(keys)

    def written(self, record: Any) -> dict[str, Any]:
        """The text, and its side where it is known."""
        split = record.meta.get("split")
        return {"text": record.text} | ({"split": split} if split else {})

    def document(self, row: Row) -> Document:
        """The text as it stands."""
        return Document(text_field(row, *_NAMES), row.id, meta_of(row))
