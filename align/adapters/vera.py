"""VeRA: two trained vectors per layer around one pair of frozen random projections shared by all layers.

"VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454, eq. 2: h = W0 x + diag(b) B diag(d) A x.
peft's implementation. The projections are drawn from `projection_seed` and not saved: the seed is in the checkpoint and
every tree of a base shares one copy of them. Cost: (r + out) trained parameters per layer; more activations than LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from align.adapters.base import Counts, Traits, adapter
from align.adapters.peft_backed import PeftAdapter
from align.adapters.shapes import base_parameters, linear_shapes
from align.adapters.targets import layers_option, targets_option
from data_prep.core.errors import UserError
from data_prep.core.options import option

if TYPE_CHECKING:
    from peft import PeftModel, VeraConfig
    from transformers import PreTrainedModel

    from align.models.low_rank import LowRankTerms


@adapter("vera")
@dataclass
class Vera(PeftAdapter):
    """Train two vectors per linear layer around shared frozen projections."""

    method: str = "vera"
    rank: int = option(256, "rank r of the shared frozen projections", low=1)
    d_initial: float = option(0.1, "start value of the vector d")
    dropout: float = option(0.0, "dropout on the term's input during supervised training; always off in PPO", below=1)
    projection_seed: int = option(0, "seed of the frozen projections; equal for all adapters of a base")
    target_modules: Any = targets_option()
    layers: Any = layers_option()

    traits: ClassVar[Traits] = Traits()
    lr_factor: ClassVar[float] = 10.0
    peft_type: ClassVar[str] = "VERA"
    peft_names: ClassVar[dict[str, str]] = {
        "rank": "r",
        "d_initial": "d_initial",
        "dropout": "vera_dropout",
        "projection_seed": "projection_prng_key",
        "target_modules": "target_modules",
    }

    def check(self, model_config: dict[str, Any]) -> list[UserError]:
        try:
            linear_shapes(model_config, self.target_modules, self.layers)
        except UserError as problem:
            return [problem]
        return []

    def agreement(self) -> dict[str, Any]:
        return {"projection_seed": self.projection_seed}

    def peft_config(self) -> VeraConfig:
        from peft import TaskType, VeraConfig

        return VeraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=self.rank,
            d_initial=self.d_initial,
            vera_dropout=self.dropout,
            projection_prng_key=self.projection_seed,
            save_projection=False,
        )

    def attach(self, tree: PreTrainedModel, trainable: bool) -> PeftModel:
        carrier = super().attach(tree, trainable)
        for name in ("vera_A", "vera_B"):
            projections = getattr(carrier.base_model, name)
            fresh = projections["default"]
            shared: dict[Any, Any] = vars(tree)["align_shared"]
            for known in shared:
                if known[0] == name and known[1] != self.projection_seed:
                    raise UserError(
                        f"a base has one pair of VeRA projections (got seeds {known[1]} and {self.projection_seed})",
                        field="adapter.projection_seed",
                        code="second_projection",
                        hint=f"set adapter.projection_seed={known[1]}",
                    )
            key = (name, self.projection_seed, tuple(fresh.shape), fresh.dtype)
            projections["default"] = shared.setdefault(key, fresh)
        return carrier

    def count(self, model_config: dict[str, Any]) -> Counts:
        shapes = linear_shapes(model_config, self.target_modules, self.layers)
        trainable = sum(self.rank + rows for rows, _ in shapes.values())
        widest_out = max(rows for rows, _ in shapes.values())
        widest_in = max(columns for _, columns in shapes.values())
        frozen = self.rank * (widest_in + widest_out)
        return Counts(trainable, frozen, base_parameters(model_config) + trainable + frozen)

    def low_rank_terms(self, carrier: PeftModel) -> LowRankTerms:
        from peft.tuners.vera import VeraLayer

        from align.models.low_rank import LowRankTerm

        terms: LowRankTerms = {}
        layers: Any = [item for item in carrier.get_base_model().named_modules() if isinstance(item[1], VeraLayer)]
        for name, module in layers:
            inner, outer = module.vera_lambda_d["default"].detach(), module.vera_lambda_b["default"].detach()
            down = module.vera_A["default"][:, : module.in_features]
            up = module.vera_B["default"][: module.out_features]
            terms[name] = LowRankTerm(inner[:, None] * down, outer[:, None] * up, 1.0)
        return terms
