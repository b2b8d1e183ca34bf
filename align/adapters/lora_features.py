"""LoRA with features: a low-rank term that is modulated by features that a row has beside its text.

h = W0 x + s B ((1 + G f) * A x + H f): "LoRA", arXiv 2106.09685, eq. 3, with the scale and shift of "FiLM: Visual
Reasoning with a General Conditioning Layer", arXiv 1709.07871, eq. 1 and 2, on its r inner activations. f are the row's
`features`: numbers, or a category, whose vector of `width` numbers is trained and shared by all layers. The modulation
is linear and has no bias, so that a row whose features are zero, or that has none, is computed as by LoRA, to the same
bits. Differs from FiLM in that, and in that H (`shift`) is left out unless asked for: without it, the adapter is a
plain LoRA for every fixed f, diag(1 + G f) A, which `fixed` makes it and which is merged and exported. G starts random
and B at zero, so that the model starts as its parent and rows with other features part from the first step.
Not LoRA-FA, which some call feature augmentation: `align/adapters/lora_fa.py` freezes A.
Cost: LoRA's parameters and r F (2 r F with `shift`) per layer, and a vector per category; one product by row and
layer more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from align.adapters.base import Counts, Traits, adapter
from align.adapters.lora import Init, Lora
from data_prep.core.errors import UserError, nearest
from data_prep.core.options import listing, option

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from align.models.low_rank import LowRankTerms
    from data_prep.types import Features


@adapter("lora_features")
@dataclass
class LoraFeatures(Lora):
    """LoRA that reads features of each row: numbers, or a category."""

    method: str = "lora_features"
    numbers: int = option(1, "how many numbers each row has as its features, where these are no category", low=1)
    categories: list[str] = listing("categories, one of which each row has as its features: [plain,pirate]")
    width: int = option(8, "numbers in the trained vector of a category", low=1)
    shift: bool = option(False, "shift the inner activation too; such an adapter is no LoRA for fixed features")
    fixed: Any = option(None, "features of every row, whatever it says of itself: a category, or a list of numbers")

    traits: ClassVar[Traits] = Traits(
        mergeable=False,
        low_rank=False,
        portable=False,
        reads_features=True,
        latency="one small product per layer and row; none once merged for fixed features",
    )

    def __post_init__(self) -> None:
        if isinstance(self.fixed, int | float) and not isinstance(self.fixed, bool):
            self.fixed = [self.fixed]
        if self.fixed is not None and not self.shift:
            self.traits = replace(type(self).traits, low_rank=True, mergeable=True)  # type: ignore[misc]

    @property
    def feature_width(self) -> int:
        """F: numbers that a row's features become."""
        return self.width if self.categories else self.numbers

    @property
    def fixed_features(self) -> Features | None:
        """The features that every row has, as rows have theirs."""
        return tuple(self.fixed) if isinstance(self.fixed, list | tuple) else self.fixed

    def check(self, model_config: dict[str, Any]) -> list[UserError]:
        if self.categories and self.numbers != 1:
            return [UserError("features are numbers or a category", field="adapter.numbers", code="bad_value")]
        if len(set(self.categories)) < len(self.categories) or any(not one.strip() for one in self.categories):
            return [UserError("needs distinct names", field="adapter.categories", code="bad_value")]
        if self.fixed is not None and (problem := self.against_features(self.fixed_features)):
            return [UserError(problem, field="adapter.fixed", code="bad_features")]
        for name, wrong in (
            ("dora", self.dora),
            ("init", self.init is not Init.default),
            ("trainable_tokens", bool(self.trainable_tokens)),
        ):
            if wrong:
                return [UserError("does not go with lora_features", field=f"adapter.{name}", code="bad_value")]
        return super().check(model_config)

    def against_features(self, features: Features | None) -> str | None:
        if features is None and self.fixed is not None:
            return None
        if self.categories:
            if features in self.categories:
                return None
            near = nearest(features, self.categories) if isinstance(features, str) else None
            guess = f"; did you mean '{near}'?" if near else ""
            got = "none" if features is None else features if isinstance(features, str) else "numbers"
            return f"no category of adapter.categories (got {got}; expected {', '.join(self.categories)}{guess})"
        if features is None or isinstance(features, str):
            return f"wrong features (got {features or 'none'}; expected {self.numbers} numbers)"
        if len(features) != self.numbers or not all(math.isfinite(x) for x in features):
            what = "numbers" if all(math.isfinite(x) for x in features) else "numbers, some of them not finite"
            return f"wrong features (got {len(features)} {what}; expected {self.numbers} numbers)"
        return None

    def count(self, model_config: dict[str, Any]) -> Counts:
        found = super().count(model_config)
        film = sum(self.ranks(model_config).values()) * self.feature_width * (2 if self.shift else 1)
        more = film + len(self.categories) * self.width
        return replace(found, trainable=found.trainable + more, total=found.total + more, saved=found.trainable + more)

    def attach(self, tree: PreTrainedModel, trainable: bool) -> PeftModel:
        from align.adapters.layers.lora_features import modulate
        from align.models.row_features import FeatureReader

        carrier = super().attach(tree, trainable)
        reader = FeatureReader(self.categories, self.feature_width, self.fixed_features)
        modulate(carrier, reader, self.shift, trainable)
        return carrier

    def save(self, carrier: PeftModel, folder: Path) -> None:
        from align.adapters.layers.lora_features import save_film

        save_film(carrier, folder)

    def load(self, tree: PreTrainedModel, folder: Path, trainable: bool) -> PeftModel:
        from align.adapters.layers.lora_features import read_film

        carrier = self.attach(tree, trainable)
        read_film(carrier, folder / "adapter_model.safetensors")
        return carrier

    def low_rank_terms(self, carrier: PeftModel) -> LowRankTerms:
        from align.adapters.layers.lora_features import fixed_terms

        return fixed_terms(carrier)

    def merge(self, carrier: PeftModel) -> PreTrainedModel:
        from align.adapters.layers.lora_features import unmodulate

        terms = self.low_rank_terms(carrier)
        unmodulate(carrier)
        return self.fold(carrier, terms)
