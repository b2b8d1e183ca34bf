"""One base over several processes: each keeps a part of every layer, and has a layer whole only while it computes it.

torch's FSDP2 sends the parts ("PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", arXiv 2304.11277).
The weights of a layer with two dimensions or more are cut along the first; norms, biases, embeddings and output head
stay whole, and so does everything that an adapter brings along. Every tree over the base has FSDP2's hooks on its own
layers, and all trees hold the same parts. A layer that is whole again has the bytes that it had, so results do not
depend on the cut.

Processes need each other in every pass of a tree. Where gradients are taken, all make equally many (`align/training/
optimizer.py`). Elsewhere each pass is announced; who has none to make sends its parts alone (`finish_passes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from data_prep.core.errors import UserError

CUT = "cut"
"""Key of a base's `Cut` among what its trees share."""
_SHARED = "align_shared"
_WHOLE = "align_whole"
_KIND = "align_kind"
_NONE = 1 << 40
_numbers = count()
_turns: WeakValueDictionary[int, Turn] = WeakValueDictionary()
_meeting: list[str] = []
"""Device type on which the processes agree; empty until a base has been cut."""


@dataclass
class Turn:
    """What passes of trees of one kind ask of the other processes: the parts of some weights, layer by layer.

    The number is the same in every process: all of them make the same kinds of trees in the same order.
    """

    layers: Sequence[Any]
    """Of a bare tree that is never computed."""
    number: int = field(default_factory=lambda: next(_numbers))

    def __post_init__(self) -> None:
        _turns[self.number] = self

    def enter(self, tree: PreTrainedModel) -> None:
        """Called before a pass: wait until all processes make one of this kind, and take part in theirs till then."""
        if torch.is_grad_enabled() or vars(tree).get(_WHOLE):
            return
        while (wanted := _agreed(self.number)) != self.number:
            _turns[wanted].take()

    def take(self) -> None:
        """Take part in a pass of another process."""
        for layer in self.layers:
            layer.unshard()
            layer.reshard()


@dataclass
class Cut:
    """A base whose layers are cut."""

    mesh: DeviceMesh
    bare: Callable[[], PreTrainedModel]
    """Makes a tree over it."""
    names: dict[int, str] = field(default_factory=dict)
    """What each of its parts is called, by identity."""
    turns: dict[frozenset[str], Turn] = field(default_factory=dict)
    """By the parts that trees of a kind ask for: some have weights of their own in place of others."""


def _agreed(number: int) -> int:
    """The smallest of what all processes ask for."""
    found = torch.tensor(number, device=_meeting[0])
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN)
    return int(found)


def finish_passes() -> None:
    """Take part in the passes that other processes have still to make; called before processes meet otherwise."""
    while _meeting and (wanted := _agreed(_NONE)) != _NONE:
        _turns[wanted].take()


@cache
def _mesh(device: str) -> DeviceMesh:
    return init_device_mesh(device, (torch.distributed.get_world_size(),))


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks of a model, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def cut(model: PreTrainedModel, device: torch.device, bare: Callable[[], PreTrainedModel]) -> Cut:
    """Keep this process's part of every layer's weights on `device`, one tensor at a time; the rest stays as it is.

    Args:
        bare: makes a tree over the model.

    Raises:
        UserError: a weight that cannot be cut into parts of one size, or none that can.
    """
    finish_passes()
    found = Cut(_mesh(device.type), bare)
    _meeting[:] = [device.type]
    layers = {id(p) for layer in layers_of(model) for p in layer.parameters() if p.dim() > 1}
    for name, whole in list(model.named_parameters(remove_duplicate=False)):
        if id(whole) in layers:
            _put(model, name, part := _part(name, whole, device, found.mesh))
            found.names[id(part)] = name
    if not found.names:
        raise UserError(
            f"no layers were found in a {model.config.model_type} that could be cut",
            code="no_layers",
            field="distributed.shard",
            hint="set distributed.shard=none",
        )
    return found


def _part(name: str, whole: nn.Parameter, device: torch.device, mesh: DeviceMesh) -> nn.Parameter:
    if whole.shape[0] % mesh.size():
        raise UserError(
            f"{mesh.size()} processes cannot have equal parts of {name} with its {whole.shape[0]} rows",
            code="uneven_parts",
            field="distributed.shard",
            hint="launch a number of processes that divides it, such as a power of two",
        )
    rows = whole.data.as_subclass(Tensor).chunk(mesh.size())[mesh.get_local_rank()]
    own = DTensor.from_local(rows.to(device, copy=True), mesh, [Shard(0)], run_check=False)
    part = nn.Parameter(own, requires_grad=False)
    if vars(whole):  # a 4-bit weight: how to read it
        vars(part).update(vars(whole), **{_KIND: type(whole)})
    return part


def gather_layers(tree: PreTrainedModel) -> None:
    """Let every layer of a tree over a cut base be whole while it computes; other trees stay as they are."""
    found: Cut | None = vars(tree).get(_SHARED, {}).get(CUT)
    if found is None or any(isinstance(layer, FSDPModule) for layer in layers_of(tree)):
        return
    wanted = frozenset(found.names[id(p)] for p in tree.parameters() if isinstance(p, DTensor))
    if wanted not in found.turns:
        bare = found.bare()
        _wrap(bare, {name: p for name, p in _parts(bare).items() if name in wanted}, found.mesh)
        found.turns[wanted] = Turn(layers_of(bare))
    _wrap(tree, _parts(tree), found.mesh)
    turn = found.turns[wanted]
    backbone = getattr(tree, tree.base_model_prefix)
    backbone.register_forward_pre_hook(lambda *_: turn.enter(tree), prepend=True)


def _parts(tree: PreTrainedModel) -> dict[str, DTensor]:
    return {name: p for name, p in tree.named_parameters(remove_duplicate=False) if isinstance(p, DTensor)}


def _wrap(tree: PreTrainedModel, parts: dict[str, DTensor], mesh: DeviceMesh) -> None:
    """Put FSDP2's hooks on the layers; they send `parts` and leave all else as it is.

    FSDP2 cuts what it is given and takes whole tensors alone, so it is shown shapes first and given the parts then.
    """
    for name, part in parts.items():
        _put(tree, name, nn.Parameter(torch.empty(part.shape, dtype=part.dtype, device="meta"), requires_grad=False))
    others = {p for name, p in tree.named_parameters() if name not in parts}
    for layer in layers_of(tree):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=others)
    backbone = getattr(tree, tree.base_model_prefix)
    fully_shard(backbone, mesh=mesh, ignored_params=set(tree.parameters()))  # one root: layers are sent ahead
    tree.load_state_dict(parts, strict=False, assign=True)


def _put(model: nn.Module, name: str, value: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)


@contextmanager
def whole_layers(tree: PreTrainedModel) -> Iterator[None]:
    """All layers of the tree are whole inside, and its passes need no other process; all processes come here."""
    found: Cut | None = vars(tree).get(_SHARED, {}).get(CUT)
    if found is None:
        yield
        return
    finish_passes()
    layers: list[Any] = layers_of(tree)
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
        layer.unshard()
    vars(tree)[_WHOLE] = True
    try:
        yield
    finally:
        del vars(tree)[_WHOLE]
        for layer in layers:
            layer.reshard()
            layer.set_reshard_after_forward(True, recurse=False)


def whole(tensor: Tensor) -> Tensor:
    """A weight of a tree in full; of a cut one all processes ask at once."""
    if not isinstance(tensor, DTensor):
        return tensor
    finish_passes()
    return tensor.full_tensor()


@contextmanager
def whole_for_now(tree: PreTrainedModel) -> Iterator[None]:
    """The tree's own parameters are whole inside, for who reads them outside a pass: all processes hold all of them."""
    parts = {}
    for name, part in list(tree.named_parameters(remove_duplicate=False)):
        if isinstance(part, DTensor):
            full = Tensor._make_subclass(vars(part).get(_KIND, nn.Parameter), whole(part.detach()), False)
            vars(full).update(vars(part))
            parts[id(full)] = (full, part)
            _put(tree, name, full)
    yield
    for name, parameter in list(tree.named_parameters(remove_duplicate=False)):
        if id(parameter) in parts:
            _put(tree, name, parts[id(parameter)][1])


def held(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, or its part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
