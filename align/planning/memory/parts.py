"""The peak memory of a stage, by parts: what is there all the time, and the phase that takes most beside it.

Weights, adapters, gradients, optimiser states and the cache of a rollout are closed forms over the tensors that the
stage's own code makes on the meta device; what passes keep is traced
(`align/planning/memory/trace.py`). Nothing is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from align.adapters.shapes import config_of, linear_layers
from align.config.schema import Load
from align.inference.cache import BLOCK
from align.models.own_functions import HEAD_ELEMENTS, HEAD_ROWS
from align.models.trunk import depth_of
from align.planning.memory.trace import traced
from align.training.options import Autocast, Optimizer, TrainingOptions

if TYPE_CHECKING:
    from torch import Tensor

    from align.models.shared_base import SharedBase
    from align.planning.devices import Device
    from align.training.rehearsal import Rehearsal

PROCESS = {"cpu": 500_000_000, "cuda": 600_000_000}
"""What a process takes on a kind of device before it has a tensor: the libraries, or the driver's context."""
SPREAD = {"cpu": (0.95, 1.55), "cuda": (0.85, 1.2)}
"""What an allocator makes of it: the least and the most that a measured peak has of the planned one."""
_BLOCK = 64
"""Weights that share a scale in 4 bits."""
_NESTED = 256
"""Scales that share a scale, where they are quantised too; and numbers that share a scale in 8-bit states."""
_SMALL = 4096
"""Tensors with fewer numbers keep float32 states with an 8-bit optimiser."""


@dataclass(frozen=True)
class StageMemory:
    """What a stage takes."""

    parts: dict[str, int]
    """Bytes by part at the peak."""
    phases: dict[str, int]
    """Bytes of every phase, all that is there meanwhile included."""
    spread: tuple[float, float]

    @property
    def peak_bytes(self) -> int:
        """At its highest."""
        return sum(self.parts.values())

    @property
    def low(self) -> int:
        """The least that it may turn out to be."""
        return round(self.peak_bytes * self.spread[0])

    @property
    def high(self) -> int:
        """The most that it may turn out to be: what fits must have room for this."""
        return round(self.peak_bytes * self.spread[1])


def memory_of(
    rehearsal: Rehearsal, bases: Sequence[SharedBase], options: Any, model_config: dict[str, Any], device: Device
) -> StageMemory:
    """The memory of a rehearsed stage.

    Args:
        bases: all that its roles stand on.
        options: of the stage.
    """
    modules = [*([rehearsal.objective] if rehearsal.objective is not None else []), *rehearsal.roles]
    below = {id(tensor) for base in bases for tensor in _tensors([base.model])}
    own = [tensor for tensor in _tensors(modules) if id(tensor) not in below]
    learned = [tensor for tensor in own if tensor.requires_grad]
    resident = {
        "process": PROCESS[device.kind],
        "weights": sum(weight_bytes(base.model, base.load) for base in bases),
        "adapters": sum(tensor.nbytes for tensor in own),
    }
    if rehearsal.objective is not None:
        resident["optimizer"] = sum(state_bytes(tensor.numel(), options.optimizer) for tensor in learned)
        if device.kind == "cpu" and (kept := trunk_bytes(rehearsal, options, model_config)):
            resident["trunk cache"] = kept
    gradients = sum(tensor.nbytes for tensor in learned)
    phases = _phases(rehearsal, options, model_config, device, gradients)
    unpacked = max((_unpacked(base, device.kind) for base in bases), default=0)
    for found in phases.values():
        if unpacked:
            found["unpacked weights"] = unpacked
    largest = max(phases.values(), key=lambda found: sum(found.values()))
    held = sum(resident.values())
    totals = {name: held + sum(found.values()) for name, found in phases.items()}
    return StageMemory({**resident, **largest}, totals, SPREAD[device.kind])


def _phases(
    rehearsal: Rehearsal, options: TrainingOptions, model_config: dict[str, Any], device: Device, gradients: int
) -> dict[str, dict[str, int]]:
    """Phase -> what it takes beside what is there all the time, by part. A step's first pass has no gradients yet."""
    found: dict[str, dict[str, int]] = {}
    vocabulary = config_of(model_config).vocab_size
    if rehearsal.objective is not None:
        bf16 = options.autocast is Autocast.bf16
        train = traced(rehearsal.objective, rehearsal.train, vocabulary, True, bf16)
        peak = max(train.forward + gradients * (rehearsal.passes > 1), train.backward)
        logits = train.logits * _wider_chunk(vocabulary, device.kind)
        rest = max(0, round(peak - gradients - train.logits))
        found["train"] = {"gradients": gradients, "activations": rest, "logits": round(logits)}
        if rehearsal.score:
            score = traced(rehearsal.objective, rehearsal.score, vocabulary, False, bf16).forward
            found["score"] = {"activations": round(score)}
    if rehearsal.answered:
        kind = next(rehearsal.roles[0].tree.parameters()).element_size()
        found["rollout"] = rollout_bytes(model_config, kind, rehearsal.answered, rehearsal.new_tokens)
    return found


def _tensors(modules: Iterable[torch.nn.Module]) -> list[Tensor]:
    """Every parameter and buffer once."""
    found = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return list(found.values())


def weight_bytes(model: Any, load: Load) -> int:
    """Bytes of a base's tensors at a precision; in 4 bits those of linear layers are packed, with their scales."""
    plain: int = sum(tensor.nbytes for tensor in _tensors([model]))
    if not load.four_bit:
        return plain
    packed = [layer.weight for layer in linear_layers(model).values()]
    return plain + sum(four_bit_bytes(w.numel(), load.double_quant) - int(w.nbytes) for w in packed)


def four_bit_bytes(count: int, double_quant: bool) -> int:
    """Bytes of so many weights of one tensor in 4 bits, with scales, code books and the offset of quantised scales."""
    scales = math.ceil(count / _BLOCK)
    code = 16 * 4
    if not double_quant:
        return math.ceil(count / 2) + 4 * scales + code
    return math.ceil(count / 2) + scales + 4 * math.ceil(scales / _NESTED) + 4 + code + _NESTED * 4


def state_bytes(count: int, optimizer: Optimizer) -> int:
    """Bytes that an optimiser keeps of so many trained numbers of one float32 tensor."""
    if optimizer is Optimizer.sgd:
        return 0
    if optimizer is Optimizer.adamw:
        return 8 * count + 4  # the step is counted by tensor
    return 8 * count if count < _SMALL else 2 * (count + 4 * math.ceil(count / _NESTED))


def trunk_bytes(rehearsal: Rehearsal, options: TrainingOptions, model_config: dict[str, Any]) -> int:
    """Bytes of hidden states that are kept in main memory of rows that come again; 0 without a block to leave out."""
    tree = rehearsal.roles[0].tree
    if not depth_of(tree):
        return 0
    each = int(config_of(model_config).hidden_size) * next(tree.parameters()).element_size()
    return min(options.trunk_room("cpu"), rehearsal.reread * each)


def rollout_bytes(model_config: dict[str, Any], size: int, prompts: Sequence[int], new_tokens: int) -> dict[str, int]:
    """Bytes of the rows that are answered at a time: keys and values of `size` bytes a number, and what is drawn from.

    One layer's buffers are there twice while they grow.
    """
    config = config_of(model_config)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    columns = ((max(prompts) + new_tokens) // BLOCK + 1) * BLOCK
    layer = 2 * len(prompts) * columns * heads * width * size
    drawn = len(prompts) * config.vocab_size * (3 * 4 + 8)  # logits, scaled, softmax; cumulated in float64
    return {"cache": layer * (config.num_hidden_layers + 1), "logits": drawn}


def _unpacked(base: SharedBase, device: str) -> int:
    """The largest 4-bit weight as it is computed with."""
    if not base.load.four_bit:
        return 0
    return max(int(layer.weight.nbytes) for layer in linear_layers(base.model).values())


def _wider_chunk(vocabulary: int, device: str) -> float:
    """How many times the rows of logits that a CPU holds at a time a device holds."""
    return 1.0 if device == "cpu" else max(1, HEAD_ELEMENTS // vocabulary) / HEAD_ROWS
