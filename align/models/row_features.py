"""Features of rows on their way to the layers that read them: a category or numbers that a row has beside its tokens.

Token ids know the features of their row (`data_prep/types.py:FeaturedIds`). A batch gathers them, a forward hands them
to the tree's reader, if an adapter has put one there. The reader is told again inside every block, by the keyword that
its attention gets, so that a block that is computed again in backward has those of its own pass, whatever has been
computed in between: hooks of the block itself do not run then.

Shape suffixes: B rows, N packed tokens, F numbers that a row's features become.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.types import Features, features_of


@dataclass(frozen=True, eq=False)
class RowFeatures:
    """The features of a batch's rows."""

    values: tuple[Features | None, ...]
    row_N: Tensor | None = None
    """Row of every packed token, int64; None where every row of the batch is a row of a tensor."""

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> RowFeatures | None:
        """Those of rows of token ids; None where no row has any."""
        values = tuple(features_of(row) for row in rows)
        return None if all(value is None for value in values) else cls(values)

    def packed(self, lengths: Sequence[int]) -> RowFeatures:
        """The same for rows that are packed end to end, of so many tokens each."""
        return replace(self, row_N=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)))

    def to(self, device: torch.device) -> RowFeatures:
        """The same for tokens on `device`."""
        return self if self.row_N is None else replace(self, row_N=self.row_N.to(device))


class FeatureReader(nn.Module):
    """Turns the features of the rows at work into numbers, for the layers of one tree.

    Args:
        categories: names of categories, each with a trained vector of `width` numbers; none: features are numbers.
        width: F.
        fixed: features of every row, whatever it says of itself.
    """

    def __init__(self, categories: Sequence[str], width: int, fixed: Features | None = None) -> None:
        super().__init__()
        self.places = {name: place for place, name in enumerate(categories)}
        self.width = width
        self.table = nn.Parameter(torch.randn(len(categories), width)) if categories else None
        self.fixed = fixed
        self._rows: RowFeatures | None = None
        self._read: tuple[RowFeatures, Tensor] | None = None

    def enter(self, rows: RowFeatures | None) -> None:
        """Take the rows of the coming pass, or of the coming block of one."""
        self._rows = rows if self.fixed is None else RowFeatures((self.fixed,))

    def numbers(self, device: torch.device) -> tuple[Tensor, Tensor | None] | None:
        """Numbers [B, F] of the rows at work, zeros for a row without features, and the row of every packed token.

        None where no row has features. One row stands for all.
        """
        rows = self._rows
        if rows is None:
            return None
        if self._read is None or self._read[0] is not rows:
            self._read = rows, self._encoded(rows.values, device)
        found = self._read[1]
        if self.table is None:
            return found, rows.row_N
        known_B1 = (found >= 0)[:, None]
        return torch.where(known_B1, self.table[found.clamp_min(0)], 0.0), rows.row_N

    def _encoded(self, values: Sequence[Any], device: torch.device) -> Tensor:
        """Places in the table [B], -1 for no category, or the numbers [B, F] themselves."""
        if self.table is not None:
            return torch.tensor([-1 if one is None else self.places[one] for one in values], device=device)
        return torch.tensor([[0.0] * self.width if one is None else list(one) for one in values], device=device)


def reader_of(tree: nn.Module) -> FeatureReader | None:
    """What reads the features of rows in a tree, if an adapter does."""
    found: FeatureReader | None = getattr(tree, "feature_reader", None)
    return found


def put_reader(tree: Any, reader: FeatureReader, blocks: Iterable[str]) -> None:
    """Make `reader` the tree's own: it enters the backbone, and the blocks of these names, with what is given there."""
    tree.add_module("feature_reader", reader)
    vars(reader)["hooks"] = hooks = []
    backbone = tree.get_submodule(tree.base_model_prefix)

    def enter(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        if module is backbone or "features" in given:
            reader.enter(given.get("features"))

    parts = [part for name in blocks for part in tree.get_submodule(name).children()]
    for one in (backbone, *parts):
        hooks.append(one.register_forward_pre_hook(enter, with_kwargs=True))


def drop_reader(tree: Any) -> None:
    """Take a tree's reader out of it."""
    for hook in vars(tree.feature_reader)["hooks"]:
        hook.remove()
    del tree.feature_reader
