"""Pretraining: predict every token of plain text.

The loss of `sft` with every token supervised. No paper. Makes the embedded base `nano` (`experiment=nano_pretrain`),
or continues pretraining on one's own documents. Costs as SFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from align.stages.base import stage
from align.stages.sft import SFT
from data_prep.core.options import option

if TYPE_CHECKING:
    from data_prep.types import Tokens


@stage("pretrain")
@dataclass
class Pretrain(SFT):
    """Predict every token of plain text."""

    needs_data: ClassVar[tuple[str, ...]] = ("text",)

    epochs: float = option(1.0, "passes over the documents", above=0)
    max_length: int = option(256, "longest piece of a document in tokens", low=2)

    def opening(self, row: Tokens) -> list[int]:
        """The first half of a document."""
        return row.ids[: max(1, len(row.ids) // 2)]
