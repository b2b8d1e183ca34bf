"""Parts of a data card that are made from rendered rows: histograms and samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from data_prep.types import LabelledTokens, PairTokens, Tokens

if TYPE_CHECKING:
    from data_prep.rendering.renderer import Renderer

BINS = 20
SAMPLES = 2
LONGEST = 600
"""Characters of a sample that are kept."""


def histogram(values: npt.ArrayLike) -> dict[str, list[int]]:
    """{"counts", "edges"} of whole numbers: at most 20 bins of one width, one edge more than counts.

    A value on an edge counts in the bin above it. Nothing for no values.
    """
    found = np.asarray(values, dtype=np.int64)
    if not len(found):
        return {}
    low, high = int(found.min()), int(found.max())
    width = -(-(high - low + 1) // BINS)
    counts = np.bincount((found - low) // width).tolist()
    return {"counts": counts, "edges": [low + width * place for place in range(len(counts) + 1)]}


def samples(rows: Sequence[Any], renderer: Renderer) -> list[dict[str, str]]:
    """The first rows as the model reads them, control tokens included, and what of them is in the loss."""
    return [_sample(row, renderer.tokenizer) for row in rows[:SAMPLES]]


def _sample(row: Any, tokenizer: Any) -> dict[str, str]:
    def text(ids: Sequence[int]) -> str:
        said = str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        return said if len(said) <= LONGEST else said[:LONGEST] + "\u2026"

    if isinstance(row, PairTokens):
        parts = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
    elif isinstance(row, LabelledTokens):
        parts = {"prompt": row.prompt, "good reply" if row.good else "bad reply": row.reply}
    elif isinstance(row, Tokens):
        in_loss = [token for token, kept in zip(row.ids[1:], row.mask[1:], strict=True) if kept]
        parts = {"row": row.ids} | ({"in the loss": in_loss} if len(in_loss) < len(row.ids) - 1 else {})
    else:
        parts = {"prompt": row.ids}
    return {"id": row.id, **{name: text(ids) for name, ids in parts.items()}}
