"""Several adapters on one base at once: batches whose rows each go through an adapter of their own.

Methods with a low-rank form share one forward: the base's products are computed once for all rows, and every layer adds
to each row the terms of its own adapter. The others (prefix, bottleneck, full tuning, ...) are roles over the same
base, and their rows are computed adapter by adapter. Inference alone; `align combine` measures with it.

Shape suffixes: T tokens of a row, N packed tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from align.checkpoints.compatibility import adapter_of
from align.inference.generation import Reply, RolloutEngine, Sampling
from align.inference.loaded import Opened
from align.models.low_rank import LowRankTerms
from align.models.packing import pack
from align.models.routed_linear import Routing, route
from align.models.shared_base import SharedBase
from align.roles import Role, chosen_logprobs
from data_prep.core.errors import UserError, unknown
from data_prep.types import Tokens

RowT = TypeVar("RowT")
Rows = Sequence[tuple[str | None, RowT]]
"""(adapter, row); None stands for the base without any adapter."""


@dataclass
class Mixed:
    """Adapters by name over one base, ready for batches of mixed rows."""

    role: Role
    """The tree with all low-rank adapters in it."""
    routing: Routing
    names: frozenset[str]
    """The adapters in that tree."""
    apart: Mapping[str, Role]
    """The adapters with trees of their own."""

    @classmethod
    def over(
        cls, base: SharedBase, terms: Mapping[str, Sequence[LowRankTerms]], apart: Mapping[str, Role] | None = None
    ) -> Mixed:
        """Adapters as low-rank terms per layer (lowest first), and others as roles over the same base."""
        tree, routing = base.tree(), Routing()
        for layer in {name: None for many in terms.values() for one in many for name in one}:
            own = {name: [one[layer] for one in many if layer in one] for name, many in terms.items()}
            route(tree.get_submodule(layer), own, routing)
        return cls(Role("mixed", tree, None).freeze(), routing, frozenset(terms), dict(apart or {}))

    @classmethod
    def of(cls, opened: Mapping[str, Opened], more: Mapping[str, Sequence[LowRankTerms]] | None = None) -> Mixed:
        """Opened checkpoints by name, on the base of the first; `more` are further adapters as terms.

        Raises:
            UserError: other bases or precisions, or a checkpoint with a score head.
        """
        first = next(iter(opened.values()))
        put_on_one_base(list(opened.values()))
        bases, load = first.bases, first.load
        terms: dict[str, Sequence[LowRankTerms]] = dict(more or {})
        apart = {}
        for name, one in opened.items():
            one.require_language_model("a mixed batch")
            if adapter_of(one.checkpoint).traits.low_rank and not one.checkpoint.record.get("derived_base"):
                terms[name] = bases.terms(one.checkpoint, load)
            else:
                apart[name] = bases.realise(one.checkpoint, name, load)
        return cls.over(bases.root(load), terms, apart)

    @classmethod
    def open(cls, targets: Mapping[str, str], out: str = "runs") -> Mixed:
        """Checkpoints by name: paths, RUN or RUN/STAGE."""
        return cls.of({name: Opened.target(target, out) for name, target in targets.items()})

    @torch.no_grad()
    def logprobs(self, rows: Rows[Sequence[int]]) -> list[Tensor]:
        """Log-probability of every token of every row but its first, under the row's adapter: [T - 1] each."""
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        for role, places in self._groups([name for name, _ in rows]):
            owners, ids = [rows[i][0] for i in places], [rows[i][1] for i in places]
            packed = pack(ids).to(role.tree.device)
            self.route([name for name, row in zip(owners, ids, strict=True) for _ in row], 1)
            ends = torch.tensor([len(row) for row in ids], device=role.tree.device).cumsum(0)
            last_N = torch.zeros(packed.tokens, dtype=torch.bool, device=role.tree.device)
            last_N[ends - 1] = True
            targets = packed.ids_1N[0].roll(-1)[~last_N]
            chosen = chosen_logprobs(role, role.hidden(packed)[~last_N], targets)
            for place, part in zip(places, chosen.split([len(row) - 1 for row in ids]), strict=True):
                found[place] = part
        return found

    @torch.no_grad()
    def losses(self, rows: Rows[Tokens], chunk: int = 32) -> dict[str | None, float]:
        """Mean loss per supervised token, in nats, of each adapter's rows; `chunk` rows share a forward."""
        totals: dict[str | None, list[float]] = {name: [0.0, 0.0] for name, _ in rows}
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            for (name, row), logprobs in zip(part, self.logprobs([(n, r.ids) for n, r in part]), strict=True):
                weights = torch.tensor(row.weights or [1.0] * len(row.ids)) * torch.tensor(row.mask)
                totals[name][0] -= float((logprobs.double().cpu() * weights[1:]).sum())
                totals[name][1] += float(weights[1:].sum())
        return {name: total / weight for name, (total, weight) in totals.items()}

    def respond(
        self,
        rows: Rows[Sequence[int]],
        sampling: Sampling,
        end_id: int,
        generator: torch.Generator | None = None,
    ) -> list[Reply]:
        """A reply to every prompt by its own adapter, in order; `end_id` ends a reply."""
        found: list[Reply] = [Reply()] * len(rows)
        for role, places in self._groups([name for name, _ in rows]):
            engine = _RoutedEngine(role, end_id) if role is self.role else RolloutEngine(role, end_id)
            if isinstance(engine, _RoutedEngine):
                engine.mixed, engine.owners = self, [rows[i][0] for i in places]
            replies = engine.generate([rows[i][1] for i in places], sampling, generator)
            for place, reply in zip(places, replies, strict=True):
                found[place] = reply
        return found

    def _groups(self, owners: Sequence[str | None]) -> list[tuple[Role, list[int]]]:
        """Roles and the numbers of the rows that each computes; all low-rank adapters and the base are one role."""
        groups: dict[Role, list[int]] = {}
        for place, name in enumerate(owners):
            groups.setdefault(self.role_of(name), []).append(place)
        return list(groups.items())

    def role_of(self, name: str | None) -> Role:
        """The role whose forward computes the rows of an adapter."""
        if name is None or name in self.names:
            return self.role
        if name not in self.apart:
            raise unknown("adapter", name, sorted({*self.names, *self.apart}))
        return self.apart[name]

    def route(self, owners: Sequence[str | None], dim: int) -> None:
        """Say which adapter each row (or packed token) of the coming forward belongs to."""
        device = self.role.tree.device
        places: dict[str, list[int]] = {}
        for place, name in enumerate(owners):
            if name is not None:
                places.setdefault(name, []).append(place)
        self.routing.places = {name: torch.tensor(found, device=device) for name, found in places.items()}
        self.routing.dim = dim


class _RoutedEngine(RolloutEngine):
    """Decoding that tells the layers whose rows the coming pass has."""

    mixed: Mixed
    owners: list[str | None]

    def _entering(self, rows: Sequence[int], packed: bool) -> None:
        self.mixed.route([self.owners[row] for row in rows], dim=1 if packed else 0)

    def _owner(self, row: int) -> str | None:
        return self.owners[row]


def put_on_one_base(opened: Sequence[Opened]) -> None:
    """Let checkpoints share the weights in memory that the first one stands on.

    Raises:
        UserError: one stands on other weights, or on the same at another precision.
    """
    first = opened[0]
    for one in opened[1:]:
        if one.bases.identity.fingerprint != first.bases.identity.fingerprint:
            raise UserError(
                f"{one.checkpoint.label} stands on another base than {first.checkpoint.label}", code="wrong_base"
            )
        if one.load is not first.load:
            raise UserError(
                f"{one.checkpoint.label} was trained on a {one.load.value} base, "
                f"{first.checkpoint.label} on a {first.load.value} one",
                code="precision_change",
                hint="train both at one precision",
            )
        one.bases = first.bases
