"""Delta-LoRA: LoRA whose frozen weights also move, by what the low-rank term moved in each step.

"Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices", arXiv 2309.02411, eq. 5: after every
step t > K, W <- W + lambda s (B' A' - B A). The sum of these steps telescopes, so that
h = W0 x + s B A x + lambda s (B A - B_K A_K) x, where B and A in the second term get no gradient: the default computes
this (`form=functional`). It needs no writable weights, so it stands on shared, bfloat16 and 4-bit bases, is exact, and
is saved as a plain LoRA of rank 2r (rank r where K = 0). Hence its update has at most rank 2r, other than the title
says; with K = 0 and an optimiser that ignores the gradient's size it is LoRA with alpha (1 + lambda).
`form=literal` writes into a copy of the weights, step by step, for comparison alone. A continued adapter goes on
without a new pause of K steps. Dropout is refused: the delta would not be that of the term that was trained.
Cost: LoRA's parameters, one more product of the term in forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.adapters.base import Counts, adapter
from align.adapters.lora import Init, Lora
from data_prep.core.errors import UserError
from data_prep.core.options import option

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


class Form(Enum):
    """How the moving weights are computed."""

    functional = "functional"
    literal = "literal"


@adapter("delta_lora")
@dataclass
class DeltaLora(Lora):
    """LoRA whose frozen weights follow the low-rank term."""

    method: str = "delta_lora"
    lambda_: float = option(0.5, "how far the weights follow each change of the term")
    start_step: int = option(0, "K: steps before the weights begin to follow")
    form: Form = option(
        Form.functional, "functional (exact sum)|literal (writes weights; for comparison, float32 only)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form is Form.literal:
            self.traits = replace(  # type: ignore[misc]
                type(self).traits, low_rank=False, four_bit=False, bf16=False, portable=False
            )

    @property
    def has_offset(self) -> bool:
        return self.start_step > 0

    def check(self, model_config: dict[str, Any]) -> list[UserError]:
        for name, wrong in (
            ("dropout", self.dropout > 0),
            ("dora", self.dora),
            ("init", self.init is not Init.default),
            ("trainable_tokens", bool(self.trainable_tokens)),
        ):
            if wrong:
                return [UserError("does not go with delta_lora", field=f"adapter.{name}", code="bad_value")]
        return super().check(model_config)

    def count(self, model_config: dict[str, Any]) -> Counts:
        found = super().count(model_config)
        if self.form is Form.literal:
            from align.adapters.shapes import linear_shapes

            shapes = linear_shapes(model_config, self.target_modules, self.layers)
            copied = sum(rows * columns for rows, columns in shapes.values())
            return replace(found, frozen=copied, saved=found.trainable + copied, total=found.total + copied)
        frozen = found.trainable if self.has_offset else 0
        return replace(found, frozen=frozen, total=found.total + frozen, saved=found.trainable + frozen)

    def attach(self, tree: PreTrainedModel, trainable: bool) -> PeftModel:
        from align.adapters.layers import delta_lora as delta

        carrier = super().attach(tree, trainable)
        if self.form is Form.literal:
            delta.own_weights(carrier)
        else:
            delta.follow(carrier, self.lambda_)
            if self.has_offset:
                delta.pause(carrier)
        return carrier

    def begin(self, tree: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        if self.start_step >= steps:
            raise UserError(
                f"the weights would never begin to follow: {steps} steps in this stage (got {self.start_step})",
                field="adapter.start_step",
                code="bad_value",
            )

    def after_step(self, tree: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        from align.adapters.layers import delta_lora as delta

        if self.form is Form.literal:
            delta.write_step(tree, self.lambda_ if step > self.start_step else 0.0)
        elif step <= self.start_step:
            delta.pass_by(tree)

    def save(self, carrier: PeftModel, folder: Path) -> None:
        from align.adapters.layers import delta_lora as delta
        from align.adapters.layers.lora_offset import save_with_offset

        delta.save_weights(carrier, folder) if self.form is Form.literal else save_with_offset(carrier, folder)

    def load(self, tree: PreTrainedModel, folder: Path, trainable: bool) -> PeftModel:
        from align.adapters.layers import delta_lora as delta
        from align.adapters.layers.lora_offset import read_with_offset

        file = folder / "adapter_model.safetensors"
        if self.form is Form.literal:
            carrier = self.attach(tree, trainable)
            delta.read_weights(carrier, file)
            return carrier
        if not self.has_offset:
            return super().load(tree, folder, trainable)
        carrier = super().attach(tree, trainable)
        delta.follow(carrier, self.lambda_)
        read_with_offset(carrier, file)
        return carrier

    def state(self, carrier: PeftModel) -> dict[str, torch.Tensor]:
        from align.adapters.layers import delta_lora as delta

        return delta.state(carrier)
