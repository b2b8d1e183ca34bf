"""How much memory a pass takes, found by doing it with tensors that have shapes and no numbers.

The objective's own forward and backward run on fake tensors, and every storage is counted from its making to its end.
So a plan knows what a method, an architecture or checkpointing keeps without a formula for it. Equal layers keep equal
amounts: of a run of them two and three are computed, and the rest follows.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from align.roles import Role

KEPT = 2
"""Layers of a run of equal ones that are computed."""


@dataclass(frozen=True)
class Traced:
    """Bytes that a pass adds to what was there before."""

    forward: float
    """At its highest until the loss is there."""
    backward: float
    """At its highest after that, new gradients among it."""
    logits: float
    """Tensors as wide as the vocabulary, at their highest."""

    @property
    def peak(self) -> float:
        """At its highest."""
        return max(self.forward, self.backward)

    def plus(self, times: int, more: Traced, less: Traced) -> Traced:
        """With `times` further layers, each of which takes what `more` has above `less`."""
        names = ("forward", "backward")
        grown = {name: getattr(self, name) + times * (getattr(more, name) - getattr(less, name)) for name in names}
        return Traced(**grown, logits=self.logits)


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that are made inside and still there.

    Args:
        before: tensors that were there before.
    """

    def __init__(self, vocabulary: int, before: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary = vocabulary
        self.bytes = self.peak = 0
        self.logits = self.logits_peak = 0
        self._known = {each.untyped_storage()._cdata: (0, False) for each in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it makes."""
        out = func(*args, **(kwargs or {}))
        for found in tree_leaves(out):
            if isinstance(found, torch.Tensor):
                self._add(found)
        return out

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size, wide = storage.nbytes(), bool(tensor.shape) and tensor.shape[-1] == self.vocabulary
        self._known[key] = size, wide
        self.bytes += size
        self.logits += size * wide
        self.peak, self.logits_peak = max(self.peak, self.bytes), max(self.logits_peak, self.logits)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        size, wide = self._known.pop(key)
        self.bytes -= size
        self.logits -= size * wide


def traced(objective: Any, rows: Sequence[Any], vocabulary: int, learns: bool = True, bf16: bool = False) -> Traced:
    """What a pass over rows adds, extrapolated over runs of equal layers.

    Args:
        objective: with its roles on the meta device, which is left as it is.
        learns: whether there is a backward.
        bf16: whether matrix products are taken in bfloat16 (autocast).
    """
    batch = objective.collate(rows)
    mode: Any = FakeTensorMode(allow_non_fake_inputs=True)
    with _fake(objective, mode):
        tensors = [*objective.parameters(), *objective.buffers()]
        stacks = _stacks(objective)
        runs = _runs(stacks)

        def once(kept: Sequence[int]) -> Traced:
            with _cut(stacks, runs, kept):
                return _once(objective, batch, mode, Live(vocabulary, tensors), learns, bf16)

        fewest = [min(KEPT, len(run)) for run in runs]
        least = found = once(fewest)
        for number, run in enumerate(runs):
            if len(run) > KEPT:
                one_more = [kept + (place == number) for place, kept in enumerate(fewest)]
                found = found.plus(len(run) - KEPT, once(one_more), least)
    return found


def _once(objective: Any, batch: Any, mode: Any, live: Live, learns: bool, bf16: bool) -> Traced:
    """One pass as the objective now is."""
    objective.train(learns)
    narrow = torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16)
    with mode, live, torch.set_grad_enabled(learns):
        with narrow:
            loss = objective(batch)[0]
        highest = live.peak
        if not learns:
            return Traced(highest, 0.0, live.logits_peak)
        live.peak = live.bytes
        loss.backward()
        found = Traced(highest, live.peak, live.logits_peak)
    for parameter in objective.parameters():
        parameter.grad = None
    return found


@contextmanager
def _fake(objective: nn.Module, mode: Any) -> Iterator[None]:
    """Give every parameter and buffer a stand-in that computes as on a CPU; one for all who share it."""
    known: dict[int, Any] = {}
    places: list[dict[str, Any]] = [
        held for module in objective.modules() for held in (module._parameters, module._buffers)
    ]
    before = [dict(held) for held in places]
    for held in places:
        for name, tensor in held.items():
            if tensor is None:
                continue
            if id(tensor) not in known:
                with mode:
                    plain = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                is_parameter = isinstance(tensor, nn.Parameter)
                known[id(tensor)] = nn.Parameter(plain, tensor.requires_grad) if is_parameter else plain
            held[name] = known[id(tensor)]
    try:
        yield
    finally:
        for held, old in zip(places, before, strict=True):
            held.update(old)


def _stacks(objective: nn.Module) -> list[nn.ModuleList]:
    """The layers of every tree; none where trees differ in number."""
    found: dict[int, nn.ModuleList] = {}
    for role in (module for module in objective.modules() if isinstance(module, Role)):
        depth = role.tree.config.get_text_config().num_hidden_layers
        lists = [m for m in role.tree.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
        if not lists:
            return []
        found[id(lists[0])] = lists[0]
    stacks = list(found.values())
    return stacks if len({len(stack) for stack in stacks}) == 1 else []


def _runs(stacks: Sequence[nn.ModuleList]) -> list[list[int]]:
    """Places of layers in runs of equal ones: in every tree of equal parts, of which the same ones are trained."""
    if not stacks:
        return []

    def look(place: int) -> list[Any]:
        return [
            [(name, tuple(p.shape), p.requires_grad) for name, p in stack[place].named_parameters()] for stack in stacks
        ]

    return [list(run) for _, run in groupby(range(len(stacks[0])), key=look)]


@contextmanager
def _cut(stacks: Sequence[nn.ModuleList], runs: Sequence[Sequence[int]], kept: Sequence[int]) -> Iterator[None]:
    """Leave so many layers of every run in all trees."""
    chosen = [place for run, count in zip(runs, kept, strict=True) for place in run[:count]]
    whole = [dict(stack._modules) for stack in stacks]
    for stack, layers in zip(stacks, whole, strict=True):
        stack._modules = {str(new): layers[str(old)] for new, old in enumerate(chosen)}
    try:
        yield
    finally:
        for stack, layers in zip(stacks, whole, strict=True):
            stack._modules = layers
