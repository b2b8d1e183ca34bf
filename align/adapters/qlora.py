"""QLoRA: LoRA on a base kept in 4-bit NormalFloat with double quantisation.

"QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, eq. 5. The method is LoRA; what it adds is the base's
precision: `nf4` with double quantisation takes 4.127 bits per weight, without it 4.5. Another 4-bit type, quantisation
of the scales or compute type along a chain is a change of precision. Differs from the paper in rank, which follows this
toolkit's LoRA default. bitsandbytes runs it on GPUs and, slowly, on CPUs. Cost: LoRA's parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from align.adapters.base import adapter
from align.adapters.lora import Lora
from align.config.schema import spelled
from data_prep.core.options import option


class FourBit(Enum):
    """4-bit number types of bitsandbytes."""

    nf4 = "nf4"
    fp4 = "fp4"


class Compute(Enum):
    """What products with 4-bit weights are taken in."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


@adapter("qlora")
@dataclass
class QLora(Lora):
    """LoRA on a 4-bit base."""

    method: str = "qlora"
    four_bit: FourBit = option(FourBit.nf4, "nf4|fp4: 4-bit number type of the base's weights")
    double_quantization: bool = option(True, "quantise the scales of the blocks too")
    compute: Compute = option(Compute.auto, "auto|fp32|bf16: what products are taken in (auto: bf16 on GPUs)")

    def quantization(self) -> str | None:
        compute = None if self.compute is Compute.auto else self.compute.value
        return spelled(self.four_bit.value, self.double_quantization, compute)
