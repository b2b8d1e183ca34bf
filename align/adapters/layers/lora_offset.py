"""LoRA layers with a frozen term subtracted from them: what PiSSA starts from, and what Delta-LoRA has passed by.

A layer computes W x + g s B A x - g s B0 A0 x, where g is 1 but for Delta-LoRA. The pair (A0, B0) is a frozen term of
the layer below peft's, inside this tree alone. What is saved is one plain LoRA with scale g s: A over A0, and B beside
-B0. Every number of it is one that the layer computes with, so that reading it back is exact.

Shape suffixes: R rank, I in, O out.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

from align.adapters.file_format import read_exactly
from align.models.low_rank import LowRankTerm, LowRankTerms, stack
from align.models.stacked_linear import drop_last_term, effective_weight

PREFIX = "base_model.model."


def lora_layers(carrier: Any) -> dict[str, Any]:
    """Full name inside the tree -> peft's LoRA layer."""
    return {n: m for n, m in carrier.get_base_model().named_modules() if isinstance(m, LoraLayer)}


def gain_of(layer: Any) -> float:
    """The factor g of a layer's term."""
    return float(getattr(layer, "gain", 1.0))


def offset_of(layer: Any) -> tuple[Tensor, Tensor] | None:
    """The layer's own subtracted pair (A0 [R, I], B0 [O, R]), if it has one."""
    number = getattr(layer, "offset_number", None)
    if number is None:
        return None
    below = layer.get_base_layer()
    return getattr(below, f"term_down_{number}"), getattr(below, f"term_up_{number}")


def subtract(carrier: PeftModel, name: str, down_RI: Tensor, up_OR: Tensor) -> None:
    """Subtract g s B0 A0 below the layer `name` of the carrier's tree."""
    tree: Any = carrier.get_base_model()
    layer = tree.get_submodule(name)
    scale = layer.scaling["default"] * gain_of(layer)
    stack(tree, {f"{name}.base_layer": LowRankTerm(down_RI, up_OR, -scale)})
    below = layer.get_base_layer()
    below.holds_offset = True
    layer.offset_number = len(below.term_scales) - 1


@torch.no_grad()
def start_at_principal(carrier: PeftModel) -> None:
    """A and B as the first singular directions of each weight, the same subtracted as a frozen term."""
    for name, layer in lora_layers(carrier).items():
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        left, size, right = torch.linalg.svd(effective_weight(layer.get_base_layer()), full_matrices=False)
        root_R = (size[: down.shape[0]] / layer.scaling["default"]).sqrt()
        down.copy_(root_R[:, None] * right[: down.shape[0]])
        up.copy_(left[:, : down.shape[0]] * root_R)
        subtract(carrier, name, down.detach().clone(), up.detach().clone())


def own_terms(carrier: PeftModel) -> LowRankTerms:
    """Each layer's effect as one exact term, its subtracted pair included."""
    terms: LowRankTerms = {}
    for name, layer in lora_layers(carrier).items():
        down, up = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        if hasattr(layer, "lora_E"):
            up = up * layer.lora_E.detach()
        if (pair := offset_of(layer)) is not None:
            down, up = torch.cat([down, pair[0]]), torch.cat([up, -pair[1]], dim=1)
        terms[name] = LowRankTerm(down, up, layer.scaling["default"] * gain_of(layer))
    return terms


def drop_offsets(tree: Any, terms: LowRankTerms) -> None:
    """Take the subtracted pairs out of a tree whose LoRA layers are gone; they are part of `terms`."""
    for name in terms:
        if vars(module := tree.get_submodule(name)).pop("holds_offset", False):
            drop_last_term(module)


def save_with_offset(carrier: PeftModel, folder: Path) -> None:
    """Write one plain LoRA in PEFT format: rank 2r where a pair is subtracted."""
    layers, terms = lora_layers(carrier), own_terms(carrier)
    config: Any = copy.deepcopy(carrier.peft_config["default"])
    ranks = {name: term.down_RI.shape[0] for name, term in terms.items()}
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    first = next(name for name, rank in ranks.items() if rank == usual)
    config.r, config.lora_alpha = usual, usual * terms[first].scale
    alphas = {name: ranks[name] * term.scale for name, term in terms.items()}
    config.rank_pattern = {re.escape(n): rank for n, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {re.escape(n): alpha for n, alpha in alphas.items() if alpha != config.lora_alpha}
    config.use_rslora, config.inference_mode, config.lora_dropout = False, True, 0.0
    tree: Any = carrier.get_base_model()
    config.base_model_name_or_path = tree.config._name_or_path
    config.save_pretrained(str(folder))
    tensors = {}
    for name in layers:
        tensors[f"{PREFIX}{name}.lora_A.weight"] = terms[name].down_RI.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = terms[name].up_OR.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def plain_shapes(carrier: PeftModel) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors that peft saves of a carrier."""
    own = get_peft_model_state_dict(carrier, save_embedding_layers=False)
    return {name: tuple(value.shape) for name, value in own.items()}


@torch.no_grad()
def read_with_offset(carrier: PeftModel, file: Path) -> None:
    """Fill layers and their subtracted pairs from a file that `save_with_offset` wrote."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in plain_shapes(carrier).items():
        shapes[name] = (2 * rows, columns) if ".lora_A." in name else (rows, 2 * columns)
    saved = read_exactly(file, shapes)
    for name, layer in lora_layers(carrier).items():
        down, up = (saved[f"{PREFIX}{name}.lora_{part}.weight"] for part in "AB")
        rank = down.shape[0] // 2
        layer.lora_A["default"].weight.copy_(down[:rank])
        layer.lora_B["default"].weight.copy_(up[:, :rank])
        device = layer.lora_A["default"].weight.device
        subtract(carrier, name, down[rank:].to(device).clone(), (-up[:, rank:]).to(device))
