"""Roles: policy, reference, reward and value as module trees over one set of base weights.

`Bases` finds the weights a checkpoint's adapter stands on and loads each set once. A `Role` is a tree with its adapter
and, for reward and value, a scalar head beside the language model; tree and head are one module, built before any
distributed wrapping.

Shape suffixes: N packed tokens, M selected tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from align.adapters.base import Adapter
from align.checkpoints.checkpoint import Checkpoint
from align.checkpoints.compatibility import ParentMode, adapter_of
from align.config.schema import Load, OnParent, Shard
from align.functional import entropy, token_logprobs
from align.models.fingerprint import base_fingerprint
from align.models.forward import head_logits, linear_head, packed_hidden
from align.models.low_rank import LowRankTerms, merge, stack
from align.models.own_functions import head_logprobs, head_statistics
from align.models.packing import Packed, pack
from align.models.sharding import gather_layers
from align.models.shared_base import BaseIdentity, SharedBase
from data_prep.core.cache_folder import Remembered
from data_prep.core.errors import UserError
from data_prep.core.hashing import sha256_json
from reward.head import ScalarHead


class Role(nn.Module):
    """A module tree with an adapter, and a head where the role scores instead of speaking."""

    def __init__(self, name: str, carrier: PreTrainedModel, adapter: Adapter | None, head: ScalarHead | None = None):
        super().__init__()
        self.name = name
        self.carrier = carrier
        self.adapter = adapter
        self.head = head
        gather_layers(self.tree)

    @property
    def tree(self) -> PreTrainedModel:
        """The causal language model itself, adapters inserted."""
        unwrap = getattr(self.carrier, "get_base_model", None)
        tree: PreTrainedModel = unwrap() if unwrap else self.carrier
        return tree

    def hidden(self, packed: Packed) -> Tensor:
        """Last hidden states of every packed token, [N, D]."""
        return packed_hidden(self.tree, packed)

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """The language-model head on selected hidden states only: [M, D] -> [M, V]."""
        return head_logits(self.tree, hidden_MD)

    def scores(self, packed: Packed, index_M: Tensor) -> Tensor:
        """The head's float32 output at selected packed positions, [M]."""
        if self.head is None:
            raise RuntimeError(f"role {self.name} has no head")
        return self.head(packed_hidden(self.tree, packed)[index_M])  # type: ignore[no-any-return]

    def freeze(self) -> Role:
        """Stop all gradients of this role; shared base tensors never had any."""
        self.requires_grad_(False)
        self.eval()
        return self

    def silence_dropout(self) -> Role:
        """Turn every dropout off, adapters included, so that repeated forwards are equal."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return self


class Bases:
    """Every set of base weights a stage needs, each loaded once."""

    def __init__(
        self,
        folder: Path,
        identity: BaseIdentity,
        device: torch.device,
        plain: bool = False,
        shard: Shard = Shard.none,
    ) -> None:
        self.folder = folder
        self.plain = plain
        self.shard = shard
        self.identity = identity
        self.device = device
        self._open: dict[tuple[str, Load], SharedBase] = {}

    def root(self, load: Load) -> SharedBase:
        """The base the chain starts from."""
        return self._opened(self.folder, self.identity, load)

    def under(self, checkpoint: Checkpoint, load: Load) -> SharedBase:
        """The base that a checkpoint's own adapter stands on."""
        parent = checkpoint.parent("init")
        if parent is None:
            return self.root(load)
        if checkpoint.on_parent == OnParent.merge.name:
            return self.merged(parent, load)
        return self.over(parent, load)

    def over(self, checkpoint: Checkpoint, load: Load) -> SharedBase:
        """The base of whatever is put on top of a checkpoint: a fully tuned one is a base itself."""
        if not adapter_of(checkpoint).traits.owns_weights:
            return self.under(checkpoint, load)
        identity = BaseIdentity(
            f"{checkpoint.stage}:{checkpoint.digest[:16]}", None, base_fingerprint(checkpoint.folder)
        )
        return self._opened(checkpoint.folder, identity, load)

    def merged(self, parent: Checkpoint, load: Load) -> SharedBase:
        """A private copy of the parent's base with the parent folded in: a second base, with its own fingerprint."""
        if self.shard is not Shard.none:
            raise UserError(
                f"{parent.label} is merged into a copy of all weights, which each process would hold",
                field="distributed.shard",
                code="whole_base",
                hint="set distributed.shard=none",
            )
        trained_at = Load.fp32 if parent.foreign else Load(parent.load)
        below = self.over(parent, trained_at)
        fingerprint = sha256_json(["merge", below.identity.fingerprint, parent.digest, load.value])
        identity = BaseIdentity(f"merge:{parent.digest[:16]}", None, fingerprint)

        def fold() -> SharedBase:
            model = self.folded(parent, trained_at)
            if load is Load.bf16:
                nn.Module.to(model, torch.bfloat16)
            merged = SharedBase.freeze(model, identity, load)
            merged.shared["folder"] = below.shared["folder"]
            return merged

        return self._get(identity, load, fold)

    def folded(self, checkpoint: Checkpoint, load: Load) -> PreTrainedModel:
        """A checkpoint's function as plain float32 weights, in a private copy of its base loaded at `load`."""
        adapter = adapter_of(checkpoint)
        model = self.over(checkpoint, load).private()
        if adapter.traits.owns_weights:
            return model
        exact = adapter.traits.low_rank
        for terms in self.terms(checkpoint, load) if exact else self.terms_under(checkpoint, load):
            merge(model, terms)
        return model if exact else adapter.merge(adapter.load(model, checkpoint.folder, trainable=False))

    def terms(self, checkpoint: Checkpoint, load: Load) -> list[LowRankTerms]:
        """The low-rank terms that make up a checkpoint on top of its base, lowest first."""
        below = self.terms_under(checkpoint, load)
        if adapter_of(checkpoint).traits.owns_weights:
            return []
        shared = self.under(checkpoint, load).shared
        key = ("terms", checkpoint.digest)
        if key not in shared:
            role = self.realise(checkpoint, "frozen", load)
            shared[key] = adapter_of(checkpoint).low_rank_terms(role.carrier)
        return [*below, shared[key]]

    def terms_under(self, checkpoint: Checkpoint, load: Load) -> list[LowRankTerms]:
        """The terms that a checkpoint's own adapter is stacked on."""
        parent = checkpoint.parent("init")
        if parent is None or checkpoint.on_parent == OnParent.merge.name:
            return []
        if checkpoint.on_parent == OnParent.stack.name:
            return self.terms(parent, load)
        return self.terms_under(parent, load)

    def realise(self, checkpoint: Checkpoint, name: str, load: Load, trainable: bool = False) -> Role:
        """A checkpoint as a role: the tree it was trained on, its adapter, and its head if it has one.

        Raises:
            UserError: what it computes here is not what it computed when it was saved; looked at once on a machine.
        """
        role = self.built(checkpoint, name, load, trainable)
        if not trainable:
            require_probe(role, checkpoint, self.identity.fingerprint, load)
        return role

    def built(self, checkpoint: Checkpoint, name: str, load: Load, trainable: bool = False) -> Role:
        """A checkpoint as a role, whatever it computes."""
        adapter = adapter_of(checkpoint)
        tree = self._tree(checkpoint, load, private=trainable)
        carrier = adapter.load(tree, checkpoint.folder, trainable)
        head = load_head(checkpoint, self.device) if checkpoint.record.get("head") else None
        role = Role(name, carrier, adapter, head)
        return role if trainable else role.freeze()

    def fresh(self, parent: Checkpoint | None, adapter: Adapter, parent_mode: ParentMode, name: str) -> Role:
        """A trainable role on a parent in the mode that its plan says; its head, if any, is the stage's business."""
        if parent is not None and parent_mode.mode is OnParent["continue"]:
            self.realise(parent, "parent", parent_mode.load)  # it computes what it did
            tree = self._tree(parent, parent_mode.load, adapter.traits.owns_weights)
            return Role(name, adapter.load(tree, parent.folder, trainable=True), adapter)
        tree = self._ground(parent, parent_mode, adapter.traits.owns_weights)
        return Role(name, adapter.attach(tree, trainable=True), adapter)

    def start_of(self, parent: Checkpoint | None, parent_mode: ParentMode, name: str) -> Role:
        """The frozen function that a fresh role starts from, in the same mode: bit-equal at any precision."""
        if parent is not None and parent_mode.mode is OnParent["continue"]:
            role = self.realise(parent, name, parent_mode.load)
            role.head = None
            return role
        return Role(name, self._ground(parent, parent_mode, private=False), None).freeze()

    def _ground(self, parent: Checkpoint | None, parent_mode: ParentMode, private: bool) -> PreTrainedModel:
        """The tree below a fresh adapter: the base, with the parent stacked or merged into it."""
        if parent is None:
            base = self.root(parent_mode.load)
        elif parent_mode.mode is OnParent.merge:
            base = self.merged(parent, parent_mode.load)
        else:
            base = self.over(parent, parent_mode.load)
        tree = base.private() if private else base.tree()
        if parent is not None and parent_mode.mode is OnParent.stack:
            for terms in self.terms(parent, parent_mode.load):
                stack(tree, terms)
        return tree

    def _tree(self, checkpoint: Checkpoint, load: Load, private: bool) -> PreTrainedModel:
        """The tree that a checkpoint's own adapter is put on; a fully tuned one is its own tree."""
        if adapter_of(checkpoint).traits.owns_weights:
            base = self.over(checkpoint, load)
            return base.private() if private else base.tree()
        tree = self.under(checkpoint, load).tree()
        for terms in self.terms_under(checkpoint, load):
            stack(tree, terms)
        return tree

    def standing_on(self, parent: Checkpoint | None, parent_mode: ParentMode) -> BaseIdentity:
        """Identity of the base that a stage's adapter stands on, for its record."""
        if parent is None:
            return self.identity
        if parent_mode.mode is OnParent.merge:
            return self.merged(parent, parent_mode.load).identity
        return self.over(parent, parent_mode.load).identity

    def opened(self) -> list[SharedBase]:
        """Every base in memory."""
        return list(self._open.values())

    def _opened(self, folder: Path, identity: BaseIdentity, load: Load) -> SharedBase:
        how = (self.device, self.plain, self.shard)
        return self._get(identity, load, lambda: SharedBase.open(folder, identity, load, *how))

    def _get(self, identity: BaseIdentity, load: Load, make: Any) -> SharedBase:
        key = (identity.fingerprint, load)
        if key not in self._open:
            self._open[key] = make()
        return self._open[key]


def load_head(checkpoint: Checkpoint, device: torch.device) -> ScalarHead:
    """The checkpoint's scalar head; a record without one, or another shape, is refused."""
    from safetensors.torch import load_file

    record = checkpoint.record["head"]
    tensors = load_file(checkpoint.folder / "head.safetensors")
    head = ScalarHead(int(record["shape"][-1])).to(device)
    expected = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    if expected != {name: tuple(value.shape) for name, value in tensors.items()}:
        raise UserError(
            "head does not have the shape its record says", file=str(checkpoint.folder / "head.safetensors")
        )
    head.load_state_dict(tensors)
    return head


@torch.no_grad()
def outputs(role: Role, probe_ids: Sequence[Sequence[int]]) -> list[list[float]]:
    """A role's outputs on probe sequences: the score of each, or the log-probability of each of its tokens."""
    result = []
    for ids in probe_ids:
        packed = pack([ids]).to(role.tree.device)
        if role.head is not None:
            result.append(role.scores(packed, torch.tensor([len(ids) - 1], device=role.tree.device)).tolist())
        else:
            hidden = role.hidden(packed)[:-1]
            result.append(chosen_logprobs(role, hidden, packed.ids_1N[0, 1:]).tolist())
    return result


def require_probe(role: Role, checkpoint: Checkpoint, base: str, load: Load) -> None:
    """Compare a frozen role's outputs with those in its checkpoint's record, once for each machine and version.

    Other machines round otherwise: in float32 by ten times what the record allows, else by a tenth in the mean.

    Raises:
        UserError: they are further apart than rounding explains.
    """
    probe = checkpoint.record.get("probe") or {}
    if not probe.get("expected") or checkpoint.load != load.value:
        return
    versions = [torch.__version__, transformers.__version__, peft.__version__]
    key, known = sha256_json([checkpoint.digest, base, role.tree.device.type, versions]), Remembered("probes.json")
    if known.get(key):
        return
    found = torch.tensor([value for row in outputs(role, checkpoint.probe_ids) for value in row])
    expected = torch.tensor([value for row in probe["expected"] for value in row])
    gaps = (found - expected).abs() / expected.abs().clamp_min(1.0)
    gap, bound = (gaps.max(), 10 * float(probe["atol"])) if load is Load.fp32 else (gaps.mean(), 0.1)
    if not float(gap) <= bound:
        raise UserError(
            f"{checkpoint.label} does not compute here what it computed when it was saved "
            f"(its outputs differ by {float(gap):.1e}; at most {bound:.0e} by rounding)",
            code="wrong_probe",
            file=str(checkpoint.folder),
            hint="is the base the right one, and are torch, transformers and peft of the versions in run.json?",
        )
    known.put(key, True)


CHUNK_ELEMENTS = 1 << 27  # logits above this many elements are computed, and recomputed in backward, in chunks


def chosen_logprobs(role: Role, hidden_MD: Tensor, targets_M: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [M] of the targets, in chunks where the logits would be large."""
    if (found := linear_head(role.tree)) is not None:
        weight_VD, bias_V, scale = found
        return head_logprobs(hidden_MD, weight_VD, bias_V, targets_M, scale / temperature)

    def head(hidden: Tensor, targets: Tensor) -> Tensor:
        return token_logprobs(role.logits(hidden), targets, temperature)

    vocabulary = role.tree.config.get_text_config().vocab_size
    rows = max(1, CHUNK_ELEMENTS // vocabulary)
    if hidden_MD.shape[0] <= rows:
        return head(hidden_MD, targets_M)
    parts = [(hidden_MD[i : i + rows], targets_M[i : i + rows]) for i in range(0, hidden_MD.shape[0], rows)]
    if not torch.is_grad_enabled():
        return torch.cat([head(*part) for part in parts])
    return torch.cat([checkpoint(head, *part, use_reentrant=False) for part in parts])


@torch.no_grad()
def chosen_statistics(
    role: Role, hidden_MD: Tensor, targets_M: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """What `chosen_logprobs` gives, to the same bits, and the entropies in nats beside it, [M] each."""
    if (found := linear_head(role.tree)) is not None:
        weight_VD, bias_V, scale = found
        return head_statistics(hidden_MD, weight_VD, bias_V, targets_M, scale / temperature)
    rows = max(1, CHUNK_ELEMENTS // role.tree.config.get_text_config().vocab_size)
    parts = []
    for start in range(0, hidden_MD.shape[0], rows):
        logits = role.logits(hidden_MD[start : start + rows])
        chosen = token_logprobs(logits, targets_M[start : start + rows], temperature)
        parts.append((chosen, entropy(logits, temperature)))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
