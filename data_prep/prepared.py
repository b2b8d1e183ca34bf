"""What preparing data gives: rows of token ids on both sides, and their data card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from data_prep.types import LabelledTokens, PairTokens, PromptTokens, Tokens

T = TypeVar("T", Tokens, PairTokens, LabelledTokens, PromptTokens)


@dataclass
class Prepared(Generic[T]):
    """Rendered rows, the data card, and the digest of everything that decides them (texts, tokenizer, template).

    Training rows stand in the order of their source (of a mixture: spread evenly); evaluation rows in the order of a
    hash of their question, so that the first n of them are a fair sample of all. Few rows are lists; many are read
    from a file when they are asked for (stored.Rows).
    """

    train: Sequence[T]
    eval: Sequence[T]
    card: dict[str, Any]
    digest: str
    highest: int = -1
    """The highest token id of any row."""
    ended: float = 0.0
    """Share of the rows whose end of turn is supervised."""
