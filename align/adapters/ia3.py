"""IA3: trained factors on keys, values and the inner activations of the feed-forward layers.

"Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", arXiv 2205.05638, section
3.3: softmax(Q (l_k * K)^T / sqrt(d)) (l_v * V), and (l_ff * act(W1 x)) W2. peft's implementation: a targeted layer's
output is scaled, or its input where it is listed under `feedforward`. Differs from peft's tables, which scale queries
in place of keys for some architectures; where queries, keys and values are one layer, all three are scaled. Cost: one
number per output (or input) of a targeted layer; none once merged, but a full-rank change of the weights, so nothing
stacks on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from align.adapters.base import Counts, Traits, adapter
from align.adapters.peft_backed import PeftAdapter
from align.adapters.shapes import base_parameters, linear_shapes
from align.adapters.targets import FUSED, KEYS, VALUES, called, chosen, feedforward_outputs, layers_option, short_names
from data_prep.core.errors import UserError
from data_prep.core.options import option

if TYPE_CHECKING:
    from peft import IA3Config
    from transformers import PreTrainedModel


@adapter("ia3")
@dataclass
class IA3(PeftAdapter):
    """Train factors on keys, values and feed-forward activations."""

    method: str = "ia3"
    target_modules: Any = option(
        "default", "layers whose outputs are scaled: default (keys, values), or names, patterns"
    )
    feedforward: Any = option(
        "default", "layers whose inputs are scaled: default (the last of the feed-forward), or names"
    )
    layers: Any = layers_option()

    traits: ClassVar[Traits] = Traits(low_rank=False)
    lr_factor: ClassVar[float] = 20.0
    peft_type: ClassVar[str] = "IA3"
    peft_names: ClassVar[dict[str, str]] = {"target_modules": "target_modules", "feedforward": "feedforward_modules"}

    def check(self, model_config: dict[str, Any]) -> list[UserError]:
        try:
            self.shapes(model_config)
        except UserError as problem:
            return [problem]
        return []

    def shapes(self, model_config: dict[str, Any]) -> dict[str, tuple[tuple[int, int], bool]]:
        """Layer name -> ((out, in), whether its input is scaled)."""
        every = linear_shapes(model_config, "all-linear", self.layers)
        inputs = feedforward_outputs(every) if self.feedforward == "default" else chosen(list(every), self.feedforward)
        if self.target_modules == "default":
            outputs = called(every, (*KEYS, *VALUES)) or called(every, FUSED)
        else:
            outputs = chosen(list(every), self.target_modules)
        if not inputs or not outputs:
            raise UserError(
                f"has no default for {model_config.get('model_type')}: no known name among its linear layers "
                f"(could match: {', '.join(short_names(every))})",
                field="adapter.target_modules" if inputs else "adapter.feedforward",
                code="no_target",
            )
        return {name: (shape, name in inputs) for name, shape in every.items() if name in inputs or name in outputs}

    def peft_config(self) -> IA3Config:
        from peft import IA3Config, TaskType

        return IA3Config(task_type=TaskType.CAUSAL_LM)

    def place(self, config: Any, tree: PreTrainedModel) -> None:
        found = self.shapes(tree.config.to_dict())
        config.target_modules = set(found)
        config.feedforward_modules = {name for name, (_, at_input) in found.items() if at_input}

    def count(self, model_config: dict[str, Any]) -> Counts:
        trainable = sum(shape[1] if at_input else shape[0] for shape, at_input in self.shapes(model_config).values())
        return Counts(trainable, 0, base_parameters(model_config) + trainable)
