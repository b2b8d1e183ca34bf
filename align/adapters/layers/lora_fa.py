"""LoRA-FA's projection of B's gradient, as a hook on the tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_RIDGE = 1e-8  # keeps A A^T invertible, as in the reference implementation


def project_gradient(layer: Any) -> None:
    """Replace g of B by g (A A^T)^-1 / s^2, in float32. Linear in g, so it may act on every part of an accumulation.

    A is read at the first backward, when it has its final values; asking twice is asking once.
    """
    if vars(layer).get("projected"):
        return
    layer.projected = True
    inverses: list[Tensor] = []

    def project(gradient_OR: Tensor) -> Tensor:
        with torch.autocast(gradient_OR.device.type, enabled=False), torch.no_grad():
            if not inverses:
                down_RI = layer.lora_A["default"].weight.float()
                gram_RR = down_RI @ down_RI.T + _RIDGE * torch.eye(down_RI.shape[0], device=down_RI.device)
                inverses.append(torch.linalg.inv(gram_RR) / layer.scaling["default"] ** 2)
            return (gradient_OR.float() @ inverses[0]).to(gradient_OR.dtype)

    layer.lora_B["default"].weight.register_hook(project)
