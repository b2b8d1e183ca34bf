"""text: {"text"} (or `content`, `document`), one document per row; a plain text file gives one row per line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.core.errors import UserError
from data_prep.formats.base import FORMATS, Format
from data_prep.formats.column_checks import meta_of, text_field
from data_prep.formats.column_roles import ANSWER, BETTER, QUESTION, WORSE, role_of
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

    @classmethod
    def doubt(cls, rows: Sequence[Mapping[str, Any]], kind: str, options: Mapping[str, Any]) -> UserError | None:
        """`content` beside a question or an answer is a part of a dialogue; `text` is a document by its name."""
        own = next((name for name in _NAMES if any(name in row for row in rows)), None)
        if own in (None, "text"):
            return None
        held = {name for row in rows for name, value in row.items() if isinstance(value, str) and value.strip()}
        roles = {name: role_of(str(name)) for name in sorted(held.difference(_NAMES))}
        parts = [name for name, role in roles.items() if role in (QUESTION, ANSWER, BETTER, WORSE)]
        if not parts:
            return None
        asked = next((name for name in parts if roles[name] == QUESTION), own)
        said = next((name for name in parts if roles[name] in (ANSWER, BETTER)), own)
        return UserError(
            f"stands beside {', '.join(parts)}: a part of a dialogue is no document",
            code="unknown_format",
            hint=f"columns={{prompt: {asked}, completion: {said}}} reads both, format=text reads {own} alone",
            field=own,
        )

    def written(self, record: Any) -> dict[str, Any]:
        """The text, and its side where it is known."""
        split = record.meta.get("split")
        return {"text": record.text} | ({"split": split} if split else {})

    def document(self, row: Row) -> Document:
        """The text as it stands."""
        return Document(text_field(row, *_NAMES), row.id, meta_of(row))
