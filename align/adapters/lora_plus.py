"""LoRA+: LoRA whose B learns faster than its A.

"LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354, section 4: lr_B = ratio x lr_A, ratio about
16. Tensors are told apart by name, so heads and other methods' vectors keep their rates. Cost: LoRA's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from align.adapters.base import adapter
from align.adapters.lora import Lora
from data_prep.core.options import option

if TYPE_CHECKING:
    import torch


@adapter("lora_plus")
@dataclass
class LoraPlus(Lora):
    """LoRA with a larger learning rate for B."""

    method: str = "lora_plus"
    lr_ratio: float = option(16.0, "learning rate of B over that of A", above=0)

    lr_factor: ClassVar[float] = 0.1

    def parameter_groups(self, tree: torch.nn.Module, lr: float) -> list[dict[str, Any]]:
        trained = [(name, p) for name, p in tree.named_parameters() if p.requires_grad]
        second = [p for name, p in trained if ".lora_B." in name]
        known = {id(p) for p in second}
        first = [p for _, p in trained if id(p) not in known]
        return [{"params": first, "lr": lr}, {"params": second, "lr": lr * self.lr_ratio}]
