"""Prefix tuning: trained keys and values of virtual tokens in every layer.

"Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv 2101.00190, eq. 3: h_i = P_theta[i] for the
virtual tokens, trained directly or as MLP(P'_theta[i]) (section 4.3, `reparametrisation`). Differs from the paper and
from peft in the default start, the keys and values of tokens drawn from the vocabulary (section 7.4 finds activations
of words better than random ones), and in that rows do not depend on padding. Gradient checkpointing is refused, as in
peft: an adapter trained with it could be trained on nowhere else.
Cost: 2 P trained parameters per layer and key-value width; P more keys in every attention at inference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from align.adapters.base import Counts, Traits, adapter
from align.adapters.file_format import read_exactly
from align.adapters.shapes import base_parameters, config_of
from align.adapters.soft_prompt import SOFT_TRAITS, Init, SoftPrompt
from data_prep.core.errors import UserError
from data_prep.core.options import option

if TYPE_CHECKING:
    from peft import PrefixTuningConfig
    from torch import Tensor
    from transformers import PreTrainedModel

    from align.models.virtual_tokens import Lead

_NETWORK_FILE = "reparametrisation.safetensors"


@adapter("prefix")
@dataclass
class Prefix(SoftPrompt):
    """Train keys and values of virtual tokens in every layer."""

    method: str = "prefix"
    reparametrisation: int = option(0, "hidden width of the network that makes the prefix in training (0: none)")

    traits: ClassVar[Traits] = replace(SOFT_TRAITS, gradient_checkpointing=False)
    lr_factor: ClassVar[float] = 50.0

    def check(self, model_config: dict[str, Any]) -> list[UserError]:
        problems = super().check(model_config)
        config = config_of(model_config)
        if self.reparametrisation and self.init is not Init.random:
            problems.append(
                UserError(
                    f"the network makes the prefix, so it cannot start from {self.init.value}",
                    field="adapter.reparametrisation",
                    code="bad_value",
                    hint="set adapter.init=random",
                )
            )
        window = getattr(config, "sliding_window", None)
        used = getattr(config, "use_sliding_window", True) and "sliding_attention" in (
            getattr(config, "layer_types", None) or ["sliding_attention"]
        )
        if window and used and window < (getattr(config, "max_position_embeddings", None) or window + 1):
            problems.append(
                UserError(
                    f"{config.model_type} forgets a prefix after its sliding window of {window} tokens",
                    field="adapter",
                    code="not_supported",
                    hint="use adapter=prompt or adapter=lora",
                )
            )
        return problems

    def peft_config(self, tree: PreTrainedModel) -> PrefixTuningConfig:
        from peft import PrefixTuningConfig, TaskType

        layers, heads, width = _shape(tree.config)
        return PrefixTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            num_virtual_tokens=self.num_virtual_tokens,
            token_dim=heads * width,
            num_layers=layers,
            num_attention_heads=heads,
            num_transformer_submodules=1,
        )

    def count(self, model_config: dict[str, Any]) -> Counts:
        layers, heads, width = _shape(config_of(model_config))
        made = 2 * layers * heads * width
        saved = trainable = self.num_virtual_tokens * made
        if (hidden := self.reparametrisation) > 0:
            trainable = (self.num_virtual_tokens + hidden) * heads * width + hidden + (hidden + 1) * made
        return Counts(trainable, 0, base_parameters(model_config) + trainable, saved)

    def width(self, tree: PreTrainedModel) -> int:
        layers, heads, width = _shape(tree.config)
        return 2 * layers * heads * width

    def start(self, tree: PreTrainedModel) -> Tensor:
        import torch

        if self.init is Init.random:
            return torch.randn(self.num_virtual_tokens, self.width(tree))
        return _activations(tree, self.start_ids(tree))

    def lead(self, tree: PreTrainedModel, embeddings: Tensor) -> Lead:
        from align.models.virtual_tokens import LeadingMemory

        return LeadingMemory(embeddings, _shape(tree.config))

    def attach(self, tree: PreTrainedModel, trainable: bool) -> PreTrainedModel:
        if not self.reparametrisation:
            return super().attach(tree, trainable)
        for problem in self.check(tree.config.to_dict()):
            raise problem
        return self._put(tree, self._network(tree), trainable)

    def load(self, tree: PreTrainedModel, folder: Path, trainable: bool) -> PreTrainedModel:
        """Frozen, the prefix itself is read; to be trained further, the network that makes it."""
        if not (self.reparametrisation and trainable):
            return super().load(tree, folder, trainable)
        lead = self._network(tree)
        shapes = {name: tuple(value.shape) for name, value in lead.state_dict().items()}
        lead.load_state_dict(read_exactly(folder / _NETWORK_FILE, shapes))
        return self._put(tree, lead, trainable)

    def save(self, carrier: Any, folder: Path) -> None:
        from safetensors.torch import save_file

        super().save(carrier, folder)
        if self.reparametrisation:
            save_file({k: v.contiguous() for k, v in carrier.lead.state_dict().items()}, folder / _NETWORK_FILE)

    def _network(self, tree: PreTrainedModel) -> Lead:
        import torch
        from torch import nn

        from align.models.virtual_tokens import LeadingMemory

        shape = _, heads, width = _shape(tree.config)
        first = nn.Linear(heads * width, self.reparametrisation)
        network = nn.Sequential(first, nn.Tanh(), nn.Linear(self.reparametrisation, self.width(tree)))
        return LeadingMemory(torch.randn(self.num_virtual_tokens, heads * width), shape, network)

    def files(self) -> tuple[str, ...]:
        return (*super().files(), *([_NETWORK_FILE] if self.reparametrisation else []))


def _shape(config: Any) -> tuple[int, int, int]:
    """Layers, key-value heads and head width.

    Raises:
        UserError: a model without attention, or with more than one kind of it.
    """
    text = config.get_text_config()
    every = getattr(text, "num_attention_heads", None)
    if not every or config.is_encoder_decoder:
        raise UserError(f"{config.model_type} has no keys and values of a decoder", code="no_target", field="adapter")
    heads = getattr(text, "num_key_value_heads", None) or every
    width = getattr(text, "head_dim", None) or text.hidden_size // every
    return text.num_hidden_layers, heads, width


def _activations(tree: PreTrainedModel, ids: list[int]) -> Tensor:
    """Keys and values of tokens in every layer, in peft's layout [P, layers * 2 * K * H]."""
    import torch
    from transformers import DynamicCache

    from align.models.sharding import gather_layers

    gather_layers(tree)
    backbone = getattr(tree, tree.base_model_prefix)
    cache: Any = DynamicCache()
    device = tree.device
    places = torch.arange(len(ids), device=device)[None]
    with torch.no_grad():
        backbone(torch.tensor([ids], device=device), position_ids=places, past_key_values=cache, use_cache=True)
    parts = [x[0] for layer in cache.layers for x in (layer.keys, layer.values)]
    return torch.stack(parts).permute(2, 0, 1, 3).reshape(len(ids), -1).to(torch.float32)
