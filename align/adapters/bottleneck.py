"""Bottleneck adapters: two small layers with a non-linearity between them, beside the frozen ones of each block.

`houlsby`: after attention and after the feed-forward, h + U phi(D h); "Parameter-Efficient Transfer Learning for NLP",
arXiv 1902.00751, section 2.1. `pfeiffer`: after the feed-forward alone; "AdapterFusion", arXiv 2005.00247, section 3.
`parallel`: beside the feed-forward, y + s U phi(D x); "Towards a Unified View of Parameter-Efficient Transfer
Learning", arXiv 2110.04366, table 1. U starts at zero, so the model starts as its parent exactly, where Houlsby has
small random numbers; the model's own norms are trained with `norms` alone, where Houlsby always trains them. peft has
no such method: files are this project's own. Cost per place: 2 d b + b + d parameters, and two more products at
inference, since a non-linear change cannot be merged or stacked on.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from align.adapters.base import Counts, Traits, adapter
from align.adapters.file_format import OwnFormat
from align.adapters.shapes import base_parameters, config_of, linear_layers, meta_model
from align.adapters.targets import (
    attention_outputs,
    block_numbers,
    block_of,
    feedforward_outputs,
    layers_option,
    short_names,
)
from data_prep.core.errors import UserError
from data_prep.core.options import option

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Placement(Enum):
    """Where the small layers stand in a block."""

    houlsby = "houlsby"
    pfeiffer = "pfeiffer"
    parallel = "parallel"


class Activation(Enum):
    """The non-linearity between the two small layers."""

    gelu = "gelu"
    relu = "relu"
    silu = "silu"


@adapter("bottleneck")
@dataclass
class Bottleneck(OwnFormat):
    """Train two small layers with a non-linearity after or beside the model's own."""

    method: str = "bottleneck"
    placement: Placement = option(
        Placement.pfeiffer,
        "houlsby (after attention and feed-forward)|pfeiffer (after feed-forward)|parallel (beside it)",
    )
    bottleneck_size: int = option(64, "width between the two small layers", low=1)
    activation: Activation = option(Activation.gelu, "gelu|relu|silu")
    scale: float = option(1.0, "factor on what is added; 4 is usual for parallel", above=0)
    dropout: float = option(0.0, "dropout inside during supervised training; always off in PPO", below=1)
    own_norm: bool = option(False, "normalise what goes in by a layer norm of its own")
    norms: bool = option(False, "train the model's own norms too, as Houlsby does")
    layers: Any = layers_option()

    traits: ClassVar[Traits] = Traits(
        mergeable=False, low_rank=False, portable=False, latency="two small layers per place and block"
    )

    def check(self, model_config: dict[str, Any]) -> list[UserError]:
        try:
            self.places(meta_model(model_config))
        except UserError as problem:
            return [problem]
        return []

    def places(self, model: Any) -> list[str]:
        """Full names of the modules whose output is changed."""
        names = list(linear_layers(model))
        blocks = block_numbers(self.layers, names)
        outs = feedforward_outputs(names)
        wanted = {"feed-forward layer": outs}
        if self.placement is Placement.parallel:
            owners = dict.fromkeys(name.rpartition(".")[0] for name in outs)
            wanted = {"feed-forward module": [name for name in owners if not name.rpartition(".")[2].isdigit()]}
        elif self.placement is Placement.houlsby:
            wanted["attention output"] = attention_outputs(names)
        for kind, found in wanted.items():
            if not found:
                raise UserError(
                    f"{self.placement.value} knows no {kind} of {model.config.model_type} "
                    f"(its linear layers: {', '.join(short_names(names))})",
                    field="adapter.placement",
                    code="no_target",
                )
        chosen = {name for found in wanted.values() for name in found}
        return [n for n, _ in model.named_modules() if n in chosen and (blocks is None or block_of(n + ".") in blocks)]

    def count(self, model_config: dict[str, Any]) -> Counts:
        from align.adapters.layers.private_weights import norm_names

        model, width, small = meta_model(model_config), config_of(model_config).hidden_size, self.bottleneck_size
        each = 2 * width * small + small + width + (2 * width if self.own_norm else 0)
        trainable = each * len(self.places(model))
        if self.norms:
            trainable += sum(model.get_parameter(name).numel() for name in norm_names(model))
        return Counts(trainable, 0, base_parameters(model_config) + trainable)

    def insert(self, tree: PreTrainedModel, trainable: bool) -> None:
        from align.adapters.layers.bottleneck import BottleneckLayer, add_to_output
        from align.adapters.layers.private_weights import make_private, norm_names

        width = tree.config.get_text_config().hidden_size
        vars(tree)["align_norms"] = norms = norm_names(tree) if self.norms else []
        for name in self.places(tree):
            layer = BottleneckLayer(width, self.bottleneck_size, self.activation.value, self.own_norm)
            layer.scale, layer.dropout.p = self.scale, self.dropout
            layer.to(tree.device).requires_grad_(trainable)
            add_to_output(tree.get_submodule(name), layer, self.placement is Placement.parallel)
        make_private(tree, norms, trainable, whole_in_each=True)

    def tensors(self, tree: PreTrainedModel) -> dict[str, Tensor]:
        norms = set(vars(tree)["align_norms"])
        return {n: p for n, p in tree.named_parameters() if ".bottleneck." in n or n in norms}
