"""What prefix and prompt tuning share: virtual tokens before every row, where they start from, and how they are kept.

The carrier is the tree itself: `align/models/forward.py` and `align/inference/generation.py` read the lead that a
tree carries. Files are PEFT's, and positions are those of peft's forward without padding: real tokens start after the
virtual ones. Unlike peft's, rows are the same with padding on either side.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from align.adapters.base import Adapter, Traits
from align.adapters.file_format import read_exactly
from align.models.tokenizer import open_tokenizer
from data_prep.core.errors import UserError
from data_prep.core.options import option

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor
    from transformers import PreTrainedModel

    from align.models.virtual_tokens import Lead

SOFT_TRAITS = Traits(
    mergeable=False,
    low_rank=False,
    starts_as_parent=False,
    soft_prompt=True,
    latency="virtual tokens in every row",
)


class Init(Enum):
    """What virtual tokens start as."""

    vocabulary = "vocabulary"
    text = "text"
    random = "random"


@dataclass
class SoftPrompt(Adapter):
    """Fills every call of the protocol from `peft_config`, `start`, `lead`, `width` and the counts."""

    num_virtual_tokens: int = option(20, "virtual tokens before every row; they take places of the context", low=1)
    init: Init = option(Init.vocabulary, "what they start as: vocabulary (tokens drawn from it)|text|random")
    init_text: str = option("", "with init=text: the text, cut or repeated to the number of virtual tokens")

    traits: ClassVar[Traits] = SOFT_TRAITS

    @property
    def virtual_tokens(self) -> int:
        return self.num_virtual_tokens

    def check(self, model_config: dict[str, Any]) -> list[UserError]:
        from align.models.fingerprint import context_length

        problems = []
        context = context_length(model_config)
        if context is not None and self.num_virtual_tokens >= context:
            problems.append(
                UserError(
                    f"no token would fit behind {self.num_virtual_tokens} virtual ones in a context of {context}",
                    field="adapter.num_virtual_tokens",
                    code="too_long",
                    hint="take fewer virtual tokens",
                )
            )
        if (self.init is Init.text) != bool(self.init_text.strip()):
            problem = "init=text needs a text" if self.init is Init.text else "is read with init=text alone"
            problems.append(UserError(problem, field="adapter.init_text", code="bad_value"))
        return problems

    def peft_config(self, tree: PreTrainedModel) -> PeftConfig:
        """The configuration that stock peft needs to load the files."""
        raise NotImplementedError

    def start(self, tree: PreTrainedModel) -> Tensor:
        """What `prompt_embeddings` holds before any training, [P, width], float32."""
        raise NotImplementedError

    def lead(self, tree: PreTrainedModel, embeddings: Tensor) -> Lead:
        """The virtual tokens of a tree, given what the adapter file holds of them."""
        raise NotImplementedError

    def width(self, tree: PreTrainedModel) -> int:
        """Columns of `prompt_embeddings`."""
        raise NotImplementedError

    def attach(self, tree: PreTrainedModel, trainable: bool) -> PreTrainedModel:
        for problem in self.check(tree.config.to_dict()):
            raise problem
        return self._put(tree, self.lead(tree, self.start(tree)), trainable)

    def load(self, tree: PreTrainedModel, folder: Path, trainable: bool) -> PreTrainedModel:
        saved = read_exactly(
            folder / "adapter_model.safetensors", {"prompt_embeddings": (self.num_virtual_tokens, self.width(tree))}
        )
        return self._put(tree, self.lead(tree, saved["prompt_embeddings"]), trainable)

    def _put(self, tree: PreTrainedModel, lead: Lead, trainable: bool) -> PreTrainedModel:
        from align.models.virtual_tokens import put_before

        put_before(tree, lead.to(tree.device).requires_grad_(trainable))
        tree.eval()
        return tree

    def save(self, carrier: Any, folder: Path) -> None:
        from safetensors.torch import save_file

        config = self.peft_config(carrier)
        config.base_model_name_or_path = carrier.config._name_or_path
        config.inference_mode = True
        config.save_pretrained(str(folder))
        embeddings = carrier.lead.flat().detach().contiguous()
        save_file({"prompt_embeddings": embeddings}, folder / "adapter_model.safetensors")

    def start_ids(self, tree: PreTrainedModel) -> list[int]:
        """Token ids that the virtual tokens start as: of the text, or drawn from the vocabulary."""
        import torch

        count = self.num_virtual_tokens
        if self.init is not Init.text:
            size = tree.config.get_text_config().vocab_size
            return torch.randint(0, size, (count,), device="cpu").tolist()
        tokenizer = open_tokenizer(vars(tree)["align_shared"]["folder"])
        ids: list[int] = tokenizer(self.init_text, add_special_tokens=False)["input_ids"]
        return (ids * -(-count // len(ids)))[:count]
