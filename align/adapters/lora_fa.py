"""LoRA-FA: LoRA with A frozen at its random start, which keeps r numbers per token instead of a layer's whole input.

"LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", arXiv 2308.03303, eq. 3:
h = W0 x + s B A x, only B trained. `projection` is the second version's closed form for B's gradient,
g <- g (A A^T)^-1 / s^2, which takes the step that full tuning would take inside A's row space; it is computed in
float32 whatever the autocast. Differs from peft's helper in that A is frozen by the role that holds it, so that other
adapters on the same base are untouched, and in that the projection is a hook on B's gradient, so any optimiser does.
Cost: r out trained and r in frozen parameters per layer; an exact low-rank term, so it merges and stacks as LoRA does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.adapters.base import Counts, adapter
from align.adapters.lora import Init, Lora
from align.adapters.shapes import base_parameters, linear_shapes
from data_prep.core.errors import UserError
from data_prep.core.options import option

if TYPE_CHECKING:
    from peft import PeftModel


@adapter("lora_fa")
@dataclass
class LoraFA(Lora):
    """LoRA that trains B alone and keeps fewer activations."""

    method: str = "lora_fa"
    projection: bool = option(False, "project B's gradient, as the second version of the paper does")

    def check(self, model_config: dict[str, Any]) -> list[UserError]:
        if self.dora or self.init is not Init.default:
            field = "adapter.dora" if self.dora else "adapter.init"
            return [UserError("lora_fa freezes A at its random start", field=field, code="bad_value")]
        return super().check(model_config)

    def freeze(self, carrier: PeftModel) -> None:
        from align.adapters.layers.lora_fa import project_gradient
        from align.adapters.layers.lora_offset import lora_layers

        for layer in lora_layers(carrier).values():
            layer.lora_A["default"].weight.requires_grad_(False)
            if self.projection:
                project_gradient(layer)

    def count(self, model_config: dict[str, Any]) -> Counts:
        shapes = linear_shapes(model_config, self.target_modules, self.layers)
        ranks = self.ranks(model_config)
        trainable = sum(ranks[name] * rows for name, (rows, _) in shapes.items()) + self.count_tokens(model_config)
        frozen = sum(ranks[name] * columns for name, (_, columns) in shapes.items())
        return Counts(trainable, frozen, base_parameters(model_config) + trainable + frozen, trainable + frozen)
