"""LoRA: a trained low-rank term beside frozen linear layers.

"LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, eq. 3: h = W0 x + (alpha / r) B A x. `rslora`
scales by alpha / sqrt(r) instead (arXiv 2312.03732, eq. 9). peft's implementation: A is drawn Kaiming-uniform, where
the paper has a Gaussian; B starts at zero either way. The default is every linear layer instead of the paper's query
and value, as in QLoRA (arXiv 2305.14314, section 4). Cost: r (in + out) trained parameters per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from align.adapters.base import Counts, Traits, adapter
from align.adapters.peft_backed import PeftAdapter
from align.adapters.shapes import base_parameters, linear_shapes
from align.adapters.targets import resolve_targets, targets_option
from align.fields import option

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

    from align.low_rank import LowRankTerms


@adapter("lora")
@dataclass
class Lora(PeftAdapter):
    """Train a low-rank term beside every linear layer."""

    method: str = "lora"
    rank: int = option(16, "rank r of the trained term", low=1)
    alpha: float = option(32.0, "scale: the term is multiplied by alpha / rank")
    dropout: float = option(0.0, "dropout on the term's input during supervised training; always off in PPO", below=1)
    rslora: bool = option(False, "scale by alpha / sqrt(rank) instead of alpha / rank")
    target_modules: Any = targets_option()

    traits: ClassVar[Traits] = Traits()

    def peft_config(self) -> LoraConfig:
        from peft import LoraConfig, TaskType

        return LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # peft takes any number
            lora_dropout=self.dropout,
            use_rslora=self.rslora,
            target_modules=resolve_targets(self.target_modules),
        )

    def count(self, model_config: dict[str, Any]) -> Counts:
        shapes = linear_shapes(model_config, self.target_modules)
        trainable = sum(self.rank * (rows + columns) for rows, columns in shapes.values())
        return Counts(trainable, 0, base_parameters(model_config) + trainable)

    def low_rank_terms(self, carrier: PeftModel) -> LowRankTerms:
        from peft.tuners.lora import LoraLayer

        from align.low_rank import LowRankTerm

        layers: Any = [item for item in carrier.get_base_model().named_modules() if isinstance(item[1], LoraLayer)]
        return {
            name: LowRankTerm(
                module.lora_A["default"].weight.detach(),
                module.lora_B["default"].weight.detach(),
                module.scaling["default"],
            )
            for name, module in layers
        }
