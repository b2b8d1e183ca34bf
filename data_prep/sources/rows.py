"""One record as read from a file, with the place where it stood, and what may stand in its place."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from data_prep.core.errors import UserError

BOM = b"\xef\xbb\xbf"
BROKEN = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, as surrogateescape writes them

_ARROW = re.compile(r"\.(parquet|arrow|feather)(\.\w+)?$|^[^/.]+/[^/]+$")


@dataclass(frozen=True)
class Row:
    """One record as read: `data` maps columns to values; `file` and `row` say where it stood."""

    file: str
    row: int
    data: dict[str, Any]

    @property
    def id(self) -> str:
        """`file:row`."""
        return f"{self.file}:{self.row}"

    @property
    def of_table(self) -> bool:
        """Whether it stood in an Arrow table (Parquet, Arrow, the hub), whose objects all have the same members."""
        return bool(_ARROW.search(self.file))

    def problem(self, field: str | None, message: str, code: str = "bad_row") -> UserError:
        """An error that names this row."""
        return UserError(message, code=code, file=self.file, row=self.row, field=field)


RowOrProblem = Row | UserError
RATING = "rating_as_label"
"""Code of a bad row that no option drops: rows beside it, whose rating is 1, would count as good replies."""
_SIDE = re.compile(
    r"(training|train)|(?:testing|test|validation|valid|val|development|dev|evaluation|eval|held[_ -]?out)",
    re.IGNORECASE,
)


def side_of(split: str) -> str | None:
    """The side that a split's name means: "train" (train_sft, train1), "eval" (val, test_sft, dev) or none."""
    name = split.strip()
    found = _SIDE.match(name)
    if found is None or name[found.end() : found.end() + 1].isalpha():
        return None
    return "train" if found[1] else "eval"


@dataclass(frozen=True)
class Skip:
    """A row (or a part of one) that is well formed but gives nothing of the kind asked for; counted under `reason`."""

    reason: str


def kind_of(value: Any) -> str:
    """JSON's word for the type of a value."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def short(text: str, length: int = 40) -> str:
    """The text, or its beginning and three dots."""
    return text if len(text) <= length else text[: length - 3] + "..."


def empty(path: str, what: str = "") -> UserError:
    """The error for a file without rows."""
    return UserError(f"is empty{what}", code="empty_file", file=path)


def bad_byte(path: str, row: int | None, found: str | int, field: str | None = None) -> UserError:
    """The error for text that is not UTF-8; `found` is the byte, or the surrogate that stands for it."""
    byte = ord(found) - 0xDC00 if isinstance(found, str) else found
    return UserError(
        f"invalid UTF-8 (got byte 0x{byte:02x}; expected UTF-8 text)", code="encoding", file=path, row=row, field=field
    )
