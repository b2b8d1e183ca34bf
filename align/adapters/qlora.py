"""QLoRA: LoRA on a base kept in 4-bit NormalFloat with double quantisation.

"QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, eq. 5. The method is LoRA; what it adds is the base's
precision (`nf4`, 4.127 bits per weight). Differs from the paper in rank, which follows this toolkit's LoRA default.
bitsandbytes runs it on GPUs and, slowly, on CPUs. Cost: LoRA's parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from align.adapters.base import adapter
from align.adapters.lora import Lora


@adapter("qlora")
@dataclass
class QLora(Lora):
    """LoRA on a 4-bit base."""

    method: str = "qlora"

    def quantization(self) -> str | None:
        return "nf4"
