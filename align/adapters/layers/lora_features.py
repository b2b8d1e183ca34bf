"""LoRA layers whose inner activation is scaled, and may be shifted, by the features of each token's row.

Shape suffixes: B rows, N tokens, I in, O out, R rank, F numbers that a row's features become.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import bnb
from safetensors.torch import save_file
from torch import Tensor, nn

from align.adapters.file_format import read_exactly, write_own_config
from align.adapters.layers.lora_offset import PREFIX, lora_layers
from align.adapters.layers.own_linear import OwnLinear, OwnLinear4bit, is_own
from align.adapters.targets import block_of
from align.models.low_rank import LowRankTerm, LowRankTerms
from align.models.row_features import FeatureReader, RowFeatures, drop_reader, put_reader, reader_of
from data_prep.core.errors import UserError


class Film(nn.Module):
    """Scale 1 + G f and shift H f of a layer's inner activation, for the numbers f of every row. H starts at zero."""

    def __init__(self, rank: int, width: int, shift: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(rank, width) * width**-0.5)
        self.shift = nn.Parameter(torch.zeros(rank, width)) if shift else None

    def forward(self, inner_NR: Tensor, numbers_BF: Tensor, row_N: Tensor | None) -> Tensor:
        """The modulated activation, [N, R]; `row_N` is None where one row stands for all tokens."""
        numbers_BF = numbers_BF.to(self.scale.dtype)

        def told(weight_RF: Tensor) -> Tensor:
            found_BR = (numbers_BF @ weight_RF.T).to(inner_NR.dtype)
            return found_BR if row_N is None else found_BR.index_select(0, row_N)

        out_NR = inner_NR * (1.0 + told(self.scale))
        return out_NR if self.shift is None else out_NR + told(self.shift)


class _Modulated:
    """W x + s B ((1 + G f) * A x + H f), where f are the features of the token's row; without features, LoRA."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        layer: Any = self
        read = layer.reader.numbers(x.device)
        if read is None:
            found: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return found
        out: Tensor = layer.base_layer(x)
        kind = out.dtype if is_own(layer) else layer.lora_A["default"].weight.dtype
        down_RI, up_OR = (part["default"].weight.to(kind) for part in (layer.lora_A, layer.lora_B))
        with torch.autocast(x.device.type, enabled=False):
            flat_NI = layer.lora_dropout["default"](x).to(kind).reshape(-1, x.shape[-1])
            inner_NR = layer.film(flat_NI @ down_RI.T, read[0], _rows_of(len(flat_NI), *read))
            scale = layer.scaling["default"]
            if is_own(layer):  # the product that adds LoRA's term too
                flat_NO: Tensor = torch.addmm(out.reshape(-1, out.shape[-1]), inner_NR, up_OR.T, alpha=scale)
                return flat_NO.view(out.shape)
            more: Tensor = ((inner_NR @ up_OR.T) * scale).view(out.shape)
            return out + more.to(out.dtype)


class ModulatedLinear(_Modulated, OwnLinear):
    """On a weight that is not quantised."""


class ModulatedLinear4bit(_Modulated, OwnLinear4bit):
    """On a 4-bit weight."""


def _rows_of(tokens: int, numbers_BF: Tensor, row_N: Tensor | None) -> Tensor | None:
    """The row of each of a layer's tokens; None where one row stands for all of them."""
    rows = len(numbers_BF)
    if rows == 1:
        return None
    if row_N is None and tokens % rows == 0:
        return torch.arange(rows, device=numbers_BF.device).repeat_interleave(tokens // rows)
    if row_N is None or len(row_N) != tokens:
        raise UserError(
            f"a layer sees {tokens} of the tokens, as experts do, so that it cannot be told whose they are",
            field="adapter.target_modules",
            code="not_supported",
            hint="leave such layers out",
        )
    return row_N


def modulate(carrier: Any, reader: FeatureReader, shift: bool, trainable: bool) -> None:
    """Let every LoRA layer of the carrier be modulated by what `reader` reads."""
    tree: Any = carrier.get_base_model()
    layers = lora_layers(carrier)
    numbers = {name: f".{block_of(name)}" for name in layers if block_of(name) is not None}
    blocks = {name[: name.index(f"{number}.")] + number for name, number in numbers.items()}
    put_reader(tree, reader.to(tree.device).requires_grad_(trainable), sorted(blocks))
    for layer in layers.values():
        film = Film(layer.lora_A["default"].weight.shape[0], reader.width, shift)
        layer.film = film.to(layer.lora_A["default"].weight.device).requires_grad_(trainable)
        layer.__class__ = ModulatedLinear4bit if isinstance(layer, bnb.Linear4bit) else ModulatedLinear
        vars(layer)["reader"] = reader  # no module of the layer's own


def unmodulate(carrier: Any) -> None:
    """Take what reads features out of a tree whose LoRA layers are going."""
    drop_reader(carrier.get_base_model())


def save_film(carrier: Any, folder: Path) -> None:
    """Write A, B, the modulation and the vectors of categories, in a type that stock peft refuses."""
    tensors = {name: value.detach().contiguous() for name, value in _tensors(carrier).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_own_config(folder, "lora_features")


@torch.no_grad()
def read_film(carrier: Any, file: Path) -> None:
    """Fill a carrier from a file that `save_film` wrote."""
    own = _tensors(carrier)
    for name, value in read_exactly(file, {n: tuple(t.shape) for n, t in own.items()}).items():
        own[name].copy_(value)


@torch.no_grad()
def fixed_terms(carrier: Any) -> LowRankTerms:
    """Each layer's term at the features that every row has: its scale, 1 + G f, is part of A."""
    reader = reader_of(carrier.get_base_model())
    assert reader is not None
    reader.enter(RowFeatures(()))
    terms: LowRankTerms = {}
    for name, layer in lora_layers(carrier).items():
        down_RI, up_OR = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        read = reader.numbers(down_RI.device)
        assert read is not None
        terms[name] = LowRankTerm(layer.film(down_RI.T, read[0], None).T, up_OR, layer.scaling["default"])
    return terms


def _tensors(carrier: Any) -> dict[str, Tensor]:
    reader = reader_of(carrier.get_base_model())
    found: dict[str, Tensor] = {}
    if reader is not None and reader.table is not None:
        found["feature_table.weight"] = reader.table
    for name, layer in lora_layers(carrier).items():
        found[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A["default"].weight
        found[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B["default"].weight
        found |= {f"{PREFIX}{name}.film_{part}.weight": value for part, value in layer.film.named_parameters()}
    return found
