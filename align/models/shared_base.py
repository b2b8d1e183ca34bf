"""SharedBase: one set of frozen weights in memory, as many module trees over it as there are roles.

A tree is a deep copy of the module structure whose parameters, buffers and quantisation states are the base's own
objects, so it costs milliseconds and no weight memory. Adapters of any method can stand on any tree; nothing is ever
switched inside a graph. What a tree must never do: merge into the shared weights, change their dtype, or move them.
"""

from __future__ import annotations

import copy
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from align.config.schema import Load, Shard
from align.models.fingerprint import read_model_config
from align.models.forward import require_supported
from align.models.loading import load_weights, state_tensors
from align.models.own_modules import put_in
from align.models.packing import ATTENTION
from align.models.quantised import kept_at, require_kept
from align.models.sharding import CUT, cut, gather_layers, held, keep_own_parts

if TYPE_CHECKING:
    from collections.abc import Iterable


SHARED = "align_shared"
"""Attribute of a tree: frozen tensors that it shares with the base's other trees."""

TRAINED = torch.float32
"""What a private copy is kept in."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_NOISE = ("dropout", "layerdrop", "pdrop", "jitter")
"""Parts of the names under which modules keep the strength of random changes in training mode."""


@dataclass(frozen=True)
class BaseIdentity:
    """What names a base in checkpoints: where it was found, which revision, and what its weights are."""

    id: str
    revision: str | None
    fingerprint: str

    def as_dict(self) -> dict[str, str | None]:
        return {"id": self.id, "revision": self.revision, "fingerprint": self.fingerprint}


@dataclass
class SharedBase:
    """Frozen weights, loaded once at one precision."""

    model: PreTrainedModel
    identity: BaseIdentity
    load: Load
    shared: dict[Any, Any] = field(default_factory=dict)
    """What several trees use besides the base: VeRA's projections, stacked parents; `folder` has the tokenizer."""

    @classmethod
    def open(
        cls,
        folder: Path,
        identity: BaseIdentity,
        load: Load,
        device: torch.device,
        plain: bool = False,
        shard: Shard = Shard.none,
    ) -> SharedBase:
        """Load a model folder at precision `load`; only safetensors, never code from the folder.

        `plain`: the model computes with the libraries' own modules alone; `shard`: what each process keeps a part of.
        """
        config = read_model_config(folder)
        require_kept(config, load)
        options: dict[str, Any] = {"dtype": _DTYPES[load.computes_in(device.type)], "attn_implementation": ATTENTION}
        if load.four_bit or (device.type != "cpu" and shard is Shard.none):
            options["device_map"] = {"": device}  # tensor by tensor: the machine's memory never holds them all
        if load.four_bit and kept_at(config) is None:
            options["quantization_config"] = _four_bit(device, load)
        model, notes = load_weights(folder, **options)
        for note in notes if os.environ.get("RANK", "0") == "0" else ():
            print(f"{folder}: {note}", file=sys.stderr)
        model.name_or_path = model.config.name_or_path = identity.id  # what adapter files name as their base
        base = cls.freeze(model, identity, load)
        base.shared["folder"] = folder
        if shard is not Shard.none:  # before all of it would lie on the device
            base.shared[CUT] = cut(model, device, base.tree, trained=shard is Shard.full)
        if not load.four_bit:
            torch.nn.Module.to(model, device)
        require_supported(base._computing(), exact=load is Load.fp32)
        put_in(base.model, plain)
        return base

    @classmethod
    def freeze(cls, model: PreTrainedModel, identity: BaseIdentity, load: Load) -> SharedBase:
        """Take a loaded model as the base: nothing in it is trained, dropout of every kind is off."""
        model.requires_grad_(False)
        model.eval()
        model.config.use_cache = False
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for name, value in vars(module).items():
                if isinstance(value, float) and any(word in name for word in _NOISE):
                    vars(module)[name] = 0.0
        if load.four_bit:
            _pin_four_bit(model, load)
        return cls(model, identity, load)

    def _computing(self) -> PreTrainedModel:
        """The bare model as it can be computed: the base itself, or a tree over one that is cut."""
        if CUT not in self.shared:
            return self.model
        tree = self.tree()
        gather_layers(tree)
        return tree

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def tree(self) -> PreTrainedModel:
        """A new module tree over the same tensors, with a configuration of its own."""
        memo: dict[int, Any] = {}
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            memo[id(tensor)] = tensor
            state = getattr(tensor, "quant_state", None)
            if state is not None:
                memo[id(state)] = state
        tree: PreTrainedModel = copy.deepcopy(self.model, memo)
        vars(tree)[SHARED] = self.shared
        return tree

    def private(self) -> PreTrainedModel:
        """A full copy of the weights in float32 (dequantised if need be), free to be trained or merged into.

        Where trained weights are cut, each process has its part of the copy.
        """
        bare = self.tree() if not self.load.four_bit else _dequantised(self.tree())
        copied: PreTrainedModel = copy.deepcopy(bare, {id(self.shared): self.shared})
        for tensor in (*copied.parameters(), *copied.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(TRAINED)
        vars(copied)[SHARED] = {name: self.shared[name] for name in ("folder", CUT) if name in self.shared}
        keep_own_parts(copied)
        return copied


def storages(modules: Iterable[torch.nn.Module]) -> dict[int, int]:
    """Every distinct tensor storage below the modules, quantisation states included: pointer -> bytes.

    Of a base that is cut over processes, the bytes that they hold together.
    """
    found: dict[int, int] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            for part in (tensor, *state_tensors(getattr(tensor, "quant_state", None))):
                storage = held(part).untyped_storage()
                if storage.data_ptr():
                    parts = part.device_mesh.size() if isinstance(part, DTensor) else 1
                    found[storage.data_ptr()] = storage.nbytes() * parts
    return found


def _four_bit(device: torch.device, load: Load = Load.nf4) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=load.weights,
        bnb_4bit_use_double_quant=load.double_quant,
        bnb_4bit_compute_dtype=_DTYPES[load.computes_in(device.type)],
    )


def _pin_four_bit(model: PreTrainedModel, load: Load) -> None:
    """Keep every 4-bit layer in training mode: one evaluation forward on a CPU with AVX512-BF16 would repack the shared
    bytes in place and shift the output of every other tree. Products are taken in what `load` says, also where the
    folder was quantised with another setting."""
    from align.models.four_bit import PinnedLinear4bit, is_four_bit

    computing = _DTYPES[load.computes_in(model.device.type)]
    for module in model.modules():
        if is_four_bit(module):
            vars(module)["compute_dtype"] = computing
            module.__class__ = PinnedLinear4bit
            module.train(True)


def _dequantised(model: PreTrainedModel) -> PreTrainedModel:
    from align.models.four_bit import dequantised_linear, is_four_bit

    for name, module in list(model.named_modules()):
        if is_four_bit(module):
            parent = model.get_submodule(name.rpartition(".")[0]) if "." in name else model
            setattr(parent, name.rpartition(".")[2], dequantised_linear(module))
    for owner, attribute in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    vars(model).update(is_loaded_in_4bit=False, is_quantized=False)
    return model
