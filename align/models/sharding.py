"""Weights over several processes: each keeps a part of every layer, and has a layer whole only while it computes it.

torch's FSDP2 sends the parts ("PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", arXiv 2304.11277).
The weights of a layer with two dimensions or more are cut along the first; norms, biases, embeddings and output head
of a base stay whole, and so does everything that an adapter brings along. Every tree over the base has FSDP2's hooks on
its own layers, and all trees hold the same parts. A layer that is whole again has the bytes that it had, so results do
not depend on the cut.

Weights that a tree trains in place of the base's (`own_part`) are cut all of them, and their gradients with them:
FSDP2 adds up each process's rows alone. What of them lies outside the layers is whole from a pass's begin to the end of
its backward, for the output head is read in between.

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
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from data_prep.core.errors import UserError

CUT = "cut"
"""Key of a base's `Cut` among what its trees share."""
_SHARED = "align_shared"
_WHOLE = "align_whole"
_KIND = "align_kind"
_PASS = "align_pass"
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

    tree: Any
    """A bare one that is never computed, or the only one with these parts."""
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
        self.tree.unshard()  # what lies outside the layers stays whole, as behind a pass
        layers: list[Any] = layers_of(self.tree)
        for layer in layers:
            layer.unshard()
            layer.reshard()


@dataclass
class Cut:
    """A base whose layers are cut."""

    mesh: DeviceMesh
    bare: Callable[[], PreTrainedModel]
    """Makes a tree over it."""
    trained: bool = False
    """Whether weights that a tree has in place of others are cut too."""
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


def cut(model: PreTrainedModel, device: torch.device, bare: Callable[[], PreTrainedModel], trained: bool) -> Cut:
    """Keep this process's part of every layer's weights on `device`, one tensor at a time; the rest stays as it is.

    Args:
        bare: makes a tree over the model.
        trained: whether weights that a tree trains in their place are cut too.

    Raises:
        UserError: a weight that cannot be cut into parts of one size, or none that can.
    """
    finish_passes()
    found = Cut(_mesh(device.type), bare, trained)
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


def own_part(tree: PreTrainedModel, value: Tensor) -> Tensor:
    """This process's part of a weight that a tree has in place of one of the base's; all of it where none is cut."""
    found = _cut_of(tree)
    if found is None or not found.trained or isinstance(value, DTensor):
        return value
    return _part_of([value], value.shape, found.mesh)


def keep_own_parts(tree: PreTrainedModel) -> None:
    """Of a tree all of whose weights are its own, keep this process's part of each, where trained weights are cut."""
    parts: dict[int, nn.Parameter] = {}  # a head that is tied stays so
    for name, value in list(tree.named_parameters(remove_duplicate=False)):
        if id(value) not in parts:
            parts[id(value)] = nn.Parameter(own_part(tree, value.detach()), value.requires_grad)
        _put(tree, name, parts[id(value)])


def part_like(pieces: Sequence[Tensor], like: Tensor) -> Tensor:
    """A tensor that lies in pieces, one after the other along its rows, as `like` is held: whole, or this part of it.

    Of a part no other rows are read.
    """
    if isinstance(pieces[0], DTensor):
        return pieces[0]
    if isinstance(like, DTensor):
        shape = torch.Size([sum(map(len, pieces)), *pieces[0].shape[1:]])
        return _part_of(pieces, shape, like.device_mesh)
    return torch.cat(list(pieces)) if len(pieces) > 1 else pieces[0]


def _part_of(pieces: Sequence[Tensor], shape: torch.Size, mesh: DeviceMesh) -> DTensor:
    """Rows are divided as FSDP2 does it: equal shares, of which the last may be short or empty."""
    size = -(-shape[0] // mesh.size())
    first = size * mesh.get_local_rank()
    found, at = [], 0
    for piece in pieces:
        found.append(piece[max(0, first - at) : max(0, first + size - at)])
        at += len(piece)
    own = torch.cat(found).to(mesh.device_type)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


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
    found = _cut_of(tree)
    if found is None or isinstance(tree, FSDPModule):
        return
    wanted = frozenset(found.names.get(id(p), "") for p in tree.parameters() if isinstance(p, DTensor))
    if "" not in wanted and wanted not in found.turns:
        bare = found.bare()
        _wrap(bare, {name: p for name, p in _parts(bare).items() if name in wanted}, found.mesh)
        found.turns[wanted] = Turn(bare)
    _wrap(tree, _parts(tree), found.mesh)
    turn = Turn(tree) if "" in wanted else found.turns[wanted]
    backbone = getattr(tree, tree.base_model_prefix)
    backbone.register_forward_pre_hook(lambda *_: turn.enter(tree), prepend=True)


def _cut_of(tree: PreTrainedModel) -> Cut | None:
    return vars(tree).get(_SHARED, {}).get(CUT)  # type: ignore[no-any-return]


def _parts(tree: PreTrainedModel) -> dict[str, nn.Parameter]:
    return {name: p for name, p in tree.named_parameters(remove_duplicate=False) if isinstance(p, DTensor)}


def _wrap(tree: PreTrainedModel, parts: dict[str, nn.Parameter], mesh: DeviceMesh) -> None:
    """Put FSDP2's hooks on the layers; they send `parts` and leave all else as it is.

    FSDP2 cuts what it is given and takes whole tensors alone, so it is shown shapes first and given the parts then.
    The tree is the one root, so that layers are sent ahead; its pass is that of its backbone.
    """
    shapes: dict[int, nn.Parameter] = {}  # a head that is tied stays so
    for name, part in parts.items():
        empty = torch.empty(part.shape, dtype=part.dtype, device="meta")
        _put(tree, name, shapes.setdefault(id(part), nn.Parameter(empty, requires_grad=part.requires_grad)))
    others = {p for name, p in tree.named_parameters() if name not in parts}
    for layer in layers_of(tree):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=others)
    fully_shard(tree, mesh=mesh, reshard_after_forward=False, ignored_params=others)
    tree.load_state_dict(parts, strict=False, assign=True)
    backbone = getattr(tree, tree.base_model_prefix)
    setattr(tree, _PASS, backbone.forward)
    register_fsdp_forward_method(tree, _PASS)
    backbone.forward = getattr(tree, _PASS)


def _put(model: nn.Module, name: str, value: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)


@contextmanager
def whole_layers(tree: PreTrainedModel) -> Iterator[None]:
    """All layers of the tree are whole inside, and its passes need no other process; all processes come here."""
    if _cut_of(tree) is None:
        yield
        return
    finish_passes()
    layers: list[Any] = layers_of(tree)
    root: Any = tree
    root.unshard()
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
        root.reshard()


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


def let_go(module: nn.Module) -> None:
    """Below the module, processes keep their parts alone: what a pass left whole goes. All processes come here."""
    every = [each for each in module.modules() if isinstance(each, FSDPModule)]
    if every:
        finish_passes()
    for each in every:
        each.reshard()


@contextmanager
def own_weights_whole(tree: PreTrainedModel, here: bool) -> Iterator[None]:
    """Weights that are the tree's own lie whole in the machine's memory inside, in the process that says `here`.

    All processes come here; the others send their parts and have one tensor at a time.
    """
    let_go(tree)
    found = _cut_of(tree)
    names = found.names if found is not None else {}
    parts = {name: p for name, p in _parts(tree).items() if id(p) not in names}
    full: dict[int, nn.Parameter] = {}
    for name, part in parts.items():
        if id(part) not in full:
            value = whole(part.detach())
            full[id(part)] = nn.Parameter(value.cpu() if here else value.new_empty(0), requires_grad=False)
        if here:
            _put(tree, name, full[id(part)])
    try:
        yield
    finally:
        for name, part in parts.items():
            _put(tree, name, part)


def held(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, or its part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
