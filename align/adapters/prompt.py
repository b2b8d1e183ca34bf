"""Prompt tuning: trained input embeddings before every row.

"The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv 2104.08691, section 2: Pr(Y | [P; X]), where only the
P embeddings are trained. Differs from peft's in that rows do not depend on padding (the embeddings stand directly
before a row's first token), and that a packed batch computes the virtual tokens once for all rows. The default start is
a sample of the vocabulary, as in section 3.2 of the paper. Cost: P d trained parameters; P tokens more per row at
inference and in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from align.adapters.base import Counts, Traits, adapter
from align.adapters.shapes import base_parameters, config_of
from align.adapters.soft_prompt import SOFT_TRAITS, Init, SoftPrompt

if TYPE_CHECKING:
    from peft import PromptTuningConfig
    from torch import Tensor
    from transformers import PreTrainedModel

    from align.models.virtual_tokens import Lead


@adapter("prompt")
@dataclass
class Prompt(SoftPrompt):
    """Train input embeddings before every row."""

    method: str = "prompt"

    traits: ClassVar[Traits] = SOFT_TRAITS
    lr_factor: ClassVar[float] = 20.0

    def peft_config(self, tree: PreTrainedModel) -> PromptTuningConfig:
        from peft import PromptTuningConfig, TaskType

        return PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            num_virtual_tokens=self.num_virtual_tokens,
            token_dim=self.width(tree),
            num_transformer_submodules=1,
        )

    def count(self, model_config: dict[str, Any]) -> Counts:
        config = config_of(model_config)
        width = getattr(config, "word_embed_proj_dim", None) or config.hidden_size
        trainable = self.num_virtual_tokens * width
        return Counts(trainable, 0, base_parameters(model_config) + trainable)

    def width(self, tree: PreTrainedModel) -> int:
        table: Any = tree.get_input_embeddings()
        return int(table.weight.shape[1])

    def start(self, tree: PreTrainedModel) -> Tensor:
        import torch

        table: Any = tree.get_input_embeddings()
        if self.init is Init.random:
            size = float(table.weight.detach().float().std())
            return torch.randn(self.num_virtual_tokens, self.width(tree)) * size
        with torch.no_grad():
            found: Tensor = table(torch.tensor(self.start_ids(tree), device=table.weight.device))
        return found.to(torch.float32, copy=True)

    def lead(self, tree: PreTrainedModel, embeddings: Tensor) -> Lead:
        from align.models.virtual_tokens import LeadingEmbeddings

        return LeadingEmbeddings(embeddings)
