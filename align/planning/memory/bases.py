"""The bases and the context of a stage that is only rehearsed: weights on the meta device, real rows.

Roles are made by the stage's own code, so that a plan knows of every tensor that a run would hold, whatever the method.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from align.adapters.base import Adapter
from align.adapters.shapes import whole_config_of
from align.checkpoints.compatibility import ParentMode, adapter_of
from align.config.schema import Load, OnParent
from align.models.low_rank import LowRankTerms
from align.models.own_modules import put_in
from align.models.packing import ATTENTION
from align.models.shared_base import BaseIdentity, SharedBase
from align.roles import Bases, Role
from align.training.context import StageContext

if TYPE_CHECKING:
    from pathlib import Path

    from data_prep.prepare.prepare import Prepared

META = torch.device("meta")
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def blank_model(model_config: dict[str, Any], load: Load, device: str, plain: bool = False) -> Any:
    """The model of a `config.json` on the meta device, as a base of this precision would be on a kind of device.

    Weights in 4 bits are of the type that they are computed in here.
    """
    from transformers import AutoModelForCausalLM

    known = {key: value for key, value in model_config.items() if key not in ("quantization_config", "dtype")}
    kind = _TYPES[load.computes_in(device)]
    with META:
        model = AutoModelForCausalLM.from_config(whole_config_of(known), attn_implementation=ATTENTION, dtype=kind)
    put_in(model, plain)
    return model


class RehearsedBases(Bases):
    """Bases without numbers. A parent may be a checkpoint or one that is still to be made: its sizes are known."""

    def __init__(self, folder: Path, model_config: dict[str, Any], kind: str, plain: bool) -> None:
        super().__init__(folder, BaseIdentity("planned", None, "planned"), META, plain)
        self._config = model_config
        self._kind = kind

    def _made(self, identity: BaseIdentity, load: Load) -> SharedBase:
        def make() -> SharedBase:
            model = blank_model(self._config, load, self._kind, self.plain)
            base = SharedBase.freeze(model, identity, Load.fp32)  # no layer is one of 4 bits here
            base.shared["folder"] = self.folder
            return replace(base, load=load)

        found: SharedBase = self._get(identity, load, make)
        return found

    def root(self, load: Load) -> SharedBase:
        return self._made(self.identity, load)

    def under(self, checkpoint: Any, load: Load) -> SharedBase:
        return self.root(load)

    def over(self, checkpoint: Any, load: Load) -> SharedBase:
        return self.root(load)

    def merged(self, parent: Any, load: Load) -> SharedBase:
        """A second base beside the one that the parent was trained on."""
        self.root(Load(parent.load))
        return self._made(BaseIdentity(f"merge:{parent.label}", None, parent.label), load)

    def terms(self, checkpoint: Any, load: Load) -> list[LowRankTerms]:
        role = self.built(checkpoint, "frozen", load)
        return [] if role.adapter is None else [role.adapter.low_rank_terms(role.carrier)]

    def realise(self, checkpoint: Any, name: str, load: Load, trainable: bool = False) -> Role:
        return self.built(checkpoint, name, load, trainable)

    def built(self, checkpoint: Any, name: str, load: Load, trainable: bool = False) -> Role:
        from reward.head import ScalarHead

        adapter, base = adapter_of(checkpoint), self.root(load)
        own = adapter.traits.owns_weights
        if own and not trainable:
            role = Role(name, base.tree(), None)
        else:
            role = Role(name, adapter.attach(base.private() if own else base.tree(), trainable), adapter)
        if checkpoint.role != "policy":
            role.head = ScalarHead(role.tree.get_output_embeddings().weight.shape[1])
        return role if trainable else role.freeze()

    def fresh(self, parent: Any, adapter: Adapter, parent_mode: ParentMode, name: str) -> Role:
        if parent is not None and parent_mode.mode is OnParent["continue"]:
            parent = None  # the parent's tensors are what is trained
        tree = self._ground(parent, parent_mode, adapter.traits.owns_weights)
        return Role(name, adapter.attach(tree, trainable=True), adapter)


class RehearsedContext(StageContext):
    """A stage's context that makes no folder and says nothing; its rows are given."""

    prepared: dict[str, Prepared[Any]]

    def rows(self, kind: str) -> Prepared[Any]:
        return self.prepared[kind]

    def warn(self, code: str, message: str, hint: str | None = None) -> None:
        """Warnings are for runs."""


def context_for(config: Any, plan: Any, bases: Bases, prepared: dict[str, Any]) -> RehearsedContext:
    """The context in which a stage is rehearsed."""
    nothing: Any = None
    accelerator: Any = SimpleNamespace(device=META, num_processes=1, process_index=0, is_main_process=False)
    make = partial(RehearsedContext, config=config, plan=plan, accelerator=accelerator, bases=bases)
    context = make(renderer=nothing, staging=nothing, metrics=nothing, inputs_digest="", saver=nothing)
    context.prepared = prepared
    return context
