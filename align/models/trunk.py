"""The trunk: the blocks below the lowest trained one, computed once a row for all roles and passes that read the row.

What such blocks give for a row does not change while a stage trains. So the hidden states behind them are kept in main
memory, and a pass over rows that were read before begins at the lowest trained block.

Where a stage may be stopped while rows are kept, each of them is computed alone. Its states then depend on nothing but
the row: not on the rows beside it, not on whether there was room to keep them, not on when they were computed. A stage
that goes on, one with less room and one on several processes get the same bits. Where nothing is kept from one state of
the stage to the next, as in PPO, new rows of a pass are computed together, which is faster. Against passes without the
cache, which add up in another order, results differ by rounding. Cost: the width of the model in numbers, for each
token that is kept.

Shape suffixes: N packed tokens, T tokens of a row, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.models.packing import Packed, pack, pack_branches
from align.models.row_features import reader_of
from align.models.sharding import layers_of
from align.models.virtual_tokens import lead_of
from data_prep.core.errors import UserError, said_by

_TRUNK = "align_trunk"
"""Attribute of a tree that leaves its trunk out."""
ROUNDING, COARSE = 1e-4, 5e-2
"""How far hidden states of both ways may be apart on several rows, over their size: in float32, and with products in
bfloat16."""


def nothing() -> None:
    """What is called when a cache is full and nobody asked to be told."""


@dataclass
class TrunkCache:
    """Hidden states behind a trunk by row, as many as there is room for; further rows are computed in every pass.

    Args:
        room: bytes.
        together: whether the new rows of a pass are computed in one, and not each alone.
        on_full: called when the first row does not fit.
    """

    room: int
    together: bool = False
    on_full: Callable[[], None] = nothing
    used: int = 0
    states: dict[bytes, Tensor] = field(default_factory=dict)
    """Row -> [T, D], on the CPU."""

    def keep(self, row: bytes, states_TD: Tensor) -> None:
        """Keep the states of a row, if there is room."""
        if self.used + states_TD.nbytes <= self.room:
            self.states[row] = states_TD.clone()
            self.used += states_TD.nbytes
        else:
            self.on_full()
            self.on_full = nothing

    def clear(self) -> None:
        """Forget all rows."""
        self.states.clear()
        self.used = 0


@dataclass(frozen=True)
class Trunk:
    """The first blocks of a tree, and where their results are kept; trees of equal trunks have one cache."""

    tree: PreTrainedModel
    blocks: Sequence[nn.Module]
    """All blocks of the tree."""
    depth: int
    """How many of them are the trunk."""
    cache: TrunkCache

    def states(self, packed: Packed) -> Tensor:
        """Hidden states behind the trunk of every packed token, [N, D]."""
        device = packed.ids_1N.device
        narrow = torch.is_autocast_enabled(device.type)
        rows = [(_key(*row, narrow), row) for row in _rows(packed)]
        known = self.cache.states
        new = {key: row for key, row in rows if key not in known}
        found: dict[bytes, Tensor] = {}
        for part in _parts(list(new), self.cache.together):
            states_ND = self._computed(_packed([new[key] for key in part]).to(device)).cpu()
            found |= zip(part, states_ND.split([len(new[key][0]) for key in part]), strict=True)
        states_ND = torch.cat([found[key] if key in found else known[key] for key, _ in rows])
        for key, states_TD in found.items():
            self.cache.keep(key, states_TD)
        return states_ND.to(device)

    @torch.no_grad()
    def _computed(self, rows: Packed) -> Tensor:
        kept: list[Tensor] = []
        backbone = getattr(self.tree, self.tree.base_model_prefix)
        hook = self.blocks[self.depth - 1].register_forward_hook(lambda _, __, out: kept.append(out))
        try:
            with _handing_on(self.blocks[self.depth :]):
                backbone.forward(**_inputs(rows))  # past its hooks, which are there for whole passes
        finally:
            hook.remove()
        return kept[0][0]

    @contextmanager
    def left_out(self, packed: Packed) -> Iterator[None]:
        """The trunk's blocks give what the cache has of these rows."""
        with _handing_on(self.blocks[: self.depth], self.states(packed)[None]):
            yield


@contextmanager
def above_trunk(tree: PreTrainedModel, packed: Packed) -> Iterator[None]:
    """Context of a pass over whole rows: the tree's trunk is left out where it has a cache."""
    trunk: Trunk | None = vars(tree).get(_TRUNK)
    if trunk is None:
        yield
        return
    with trunk.left_out(packed):
        yield


def depth_of(tree: PreTrainedModel) -> int:
    """How many blocks, from the first one on, give the same in every pass: nothing in or before them is trained.

    A block with active dropout ends the trunk, too. What decides is which tensors are trained, whatever the method.
    """
    blocks, head, table = layers_of(tree), tree.get_output_embeddings(), tree.get_input_embeddings()
    behind = {id(p) for part in (*blocks, head) for p in part.parameters()} - {id(p) for p in table.parameters()}
    before = [p for p in tree.parameters() if id(p) not in behind]
    if lead_of(tree) is not None or any(p.requires_grad for p in before):
        return 0
    return next((place for place, block in enumerate(blocks) if _changes(block)), len(blocks))


def alike(trees: Mapping[str, PreTrainedModel], anchor: str) -> list[str]:
    """Names of the trees that have the trunk of the tree called `anchor`, that one's among them; none without one."""
    depth = depth_of(trees[anchor])
    own = _contents(trees[anchor], depth)
    return [name for name, tree in trees.items() if 0 < depth <= depth_of(tree) and _contents(tree, depth) == own]


def attach_trunk(trees: Mapping[str, PreTrainedModel], depth: int, cache: TrunkCache) -> None:
    """Let trees that are alike leave their first `depth` blocks out of passes over rows that the cache knows.

    Called in the autocast context of the passes to come.

    Raises:
        UserError: a tree's results are not those of all blocks; none of the trees has a trunk then.
    """
    _leave_out(trees, depth, TrunkCache(1 << 30))
    for name, tree in trees.items():
        if (why := _disagreement(tree)) is not None:
            for each in trees.values():
                release_trunk(each)
            raise UserError(f"with the trunk cache, {why} of the {name} role", code="trunk_differs")
    _leave_out(trees, depth, cache)


def release_trunk(tree: PreTrainedModel) -> None:
    """Let the tree compute all its blocks again."""
    vars(tree).pop(_TRUNK, None)


def has_trunk(tree: PreTrainedModel) -> bool:
    """Whether a cache keeps what the tree's trunk gives for a row: it knows a row that comes as it came before."""
    return _TRUNK in vars(tree)


def forget_rows(tree: PreTrainedModel) -> None:
    """Drop what is kept of rows, for all trees that share the cache: they will not be read again."""
    if (trunk := vars(tree).get(_TRUNK)) is not None:
        trunk.cache.clear()


def _leave_out(trees: Mapping[str, PreTrainedModel], depth: int, cache: TrunkCache) -> None:
    for tree in trees.values():
        vars(tree)[_TRUNK] = Trunk(tree, layers_of(tree), depth, cache)


def _changes(block: nn.Module) -> bool:
    noisy = any(isinstance(module, nn.Dropout) and module.p > 0 for module in block.modules())
    return noisy or any(p.requires_grad for p in block.parameters())


def _contents(tree: PreTrainedModel, depth: int) -> list[tuple[str, type, tuple[int, ...]]]:
    """The modules that compute what the first blocks give, each with its own tensors."""
    after = [*layers_of(tree)[depth:], tree.get_output_embeddings(), reader_of(tree)]
    left = {id(module) for part in after if part is not None for module in part.modules()}
    return [
        (name, type(module), tuple(map(id, (*module._parameters.values(), *module._buffers.values()))))
        for name, module in tree.named_modules()
        if id(module) not in left
    ]


def _rows(packed: Packed) -> list[tuple[Tensor, Tensor]]:
    """Token ids and positions of every row, [T] each, on the CPU: a row begins at position 0."""
    ids_N, positions_N = packed.ids_1N[0].cpu(), packed.positions_1N[0].cpu()
    starts = [*(positions_N == 0).nonzero()[:, 0].tolist(), len(ids_N)]
    return [(ids_N[start:end], positions_N[start:end]) for start, end in pairwise(starts)]


def _key(ids_T: Tensor, positions_T: Tensor, narrow: bool) -> bytes:
    """Names a row: its tokens, where it branches, and the precision of products."""
    return hashlib.sha256(ids_T.numpy().tobytes() + positions_T.numpy().tobytes() + bytes([narrow])).digest()


def _parts(keys: list[bytes], together: bool) -> list[list[bytes]]:
    """Which new rows are computed in one pass."""
    if together:
        return [keys] if keys else []
    return [[key] for key in keys]


def _packed(rows: Sequence[tuple[Tensor, Tensor]]) -> Packed:
    """Rows as a batch of their own. Where positions step back, another branch of a row's prefix begins."""
    prefixes, branches = [], []
    for ids_T, positions_T in rows:
        backs = ((positions_T.diff() != 1).nonzero()[:, 0] + 1).tolist()
        first, *others = (ids_T[start:end].tolist() for start, end in pairwise([0, *backs, len(ids_T)]))
        shared = int(positions_T[backs[0]]) if backs else len(first)
        prefixes.append(first[:shared])
        branches.append([first[shared:], *others])
    return pack_branches(prefixes, branches)


@contextmanager
def _handing_on(blocks: Sequence[nn.Module], value_1ND: Tensor | None = None) -> Iterator[None]:
    """Blocks that compute nothing: they give `value_1ND`, or else what they are given."""

    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states if value_1ND is None else value_1ND

    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        vars(block)["forward"] = forward
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                del vars(block)["forward"]
            else:
                vars(block)["forward"] = own


def _inputs(packed: Packed) -> dict[str, Any]:
    return {
        "input_ids": packed.ids_1N,
        "position_ids": packed.positions_1N,
        "layout": packed.layout,
        "use_cache": False,
    }


@torch.no_grad()
def _disagreement(tree: PreTrainedModel) -> str | None:
    """What is wrong with passes that leave the trunk out, on rows made up: a row alone to the bit, several as rounding
    allows. Where another tree has filled the cache, it is that one's trunk."""
    device, vocabulary = tree.device, tree.config.get_text_config().vocab_size
    rows = [[(7 * i + 3 * length) % vocabulary for i in range(length)] for length in (5, 9, 2)]
    pair = pack_branches([rows[0]], [(rows[1], rows[2])])
    backbone, training = getattr(tree, tree.base_model_prefix), tree.training
    narrow = torch.is_autocast_enabled(device.type)
    tree.eval()
    try:
        for packed, exact in ((pack(rows[:1]), True), (pair, True), (pack(rows), False)):
            packed = packed.to(device)
            plain_ND = backbone(**_inputs(packed)).last_hidden_state[0]
            with above_trunk(tree, packed):
                found_ND = backbone(**_inputs(packed)).last_hidden_state[0]
            gap, size = float((found_ND - plain_ND).abs().max()), float(plain_ND.abs().max())
            rounding = COARSE if narrow or plain_ND.dtype is torch.bfloat16 else ROUNDING
            if not gap <= (0.0 if exact else rounding * max(1.0, size)):
                return f"hidden states differ by {gap:.1e} from those of all blocks"
    except (TypeError, AttributeError, ValueError, RuntimeError, KeyError, IndexError) as error:
        return f"{type(error).__name__}: {said_by(error)}"
    finally:
        tree.train(training)
    return None
