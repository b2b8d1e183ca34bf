"""The adapter protocol: an adapter decides which weights of a tree may change, and how they are kept on disk.

A method is a dataclass whose fields are Hydra options. It lives in one file of this folder and registers itself with
`@adapter("name")`; the command line, sweeps, `--help` and the contract tests then see it with no second edit.
Importing a method must not import torch: modules that need it live in `align/adapters/layers/`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from align.config.registries import adapters
from data_prep.core.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from align.models.low_rank import LowRankTerms
    from data_prep.types import Features

AdapterT = TypeVar("AdapterT", bound="type[Adapter]")


@dataclass(frozen=True)
class Traits:
    """What a method can and cannot do, stated once and read by checks and documentation."""

    mergeable: bool = True
    """Its effect can be folded into the base's weights."""
    low_rank: bool = True
    """Its effect on every linear layer is exactly a low-rank term, so another method can be stacked on it."""
    four_bit: bool = True
    """It can stand on a base kept in 4 bits."""
    bf16: bool = True
    """It can stand on a base kept in bfloat16."""
    gradient_checkpointing: bool = True
    """Its gradients are equal when activations are recomputed in backward."""
    portable: bool = True
    """Stock peft loads what it saves and computes the same."""
    owns_weights: bool = False
    """It trains a private copy of the base's weights instead of a few tensors beside them."""
    starts_as_parent: bool = True
    """Before training the model computes what it computed without the method."""
    reads_weights: bool = False
    """It computes from the weights it stands on, so terms stacked beside them would be left out."""
    reads_features: bool = False
    """What it computes depends on the features that a row has beside its text."""
    soft_prompt: bool = False
    """It takes places of the context: virtual tokens before every row, whose positions start after them."""
    latency: str = "none once merged"
    """What it costs at inference."""


@dataclass(frozen=True)
class Counts:
    """Parameter counts of one method on one architecture; heads are never included."""

    trainable: int
    frozen: int
    """Frozen tensors the method itself brings along (VeRA's projections)."""
    total: int
    """Base and adapter together."""
    saved: int | None = None
    """Parameters in the saved file, where they are not those trained."""


def adapter(name: str) -> Callable[[AdapterT], AdapterT]:
    """Register a method under `name`, as a Hydra choice too (`adapter=name`)."""

    def register(cls: AdapterT) -> AdapterT:
        from hydra.core.config_store import ConfigStore

        ConfigStore.instance().store(group="adapter", name=name, node=cls)
        adapters.register(name)(cls)
        return cls

    return register


@dataclass
class Adapter:
    """Base of every method. Trees are Hugging Face causal language models from `SharedBase.tree()`."""

    traits: ClassVar[Traits] = Traits()
    lr_factor: ClassVar[float] = 1.0
    """Usual learning rate of the method over LoRA's."""
    peft_names: ClassVar[dict[str, str]] = {}
    """Option -> its key in peft's adapter_config.json. With a `peft_type`, a plain peft adapter can be a parent."""

    @property
    def virtual_tokens(self) -> int:
        """Places of the context that the method takes before every row."""
        return 0

    @property
    def named_tokens(self) -> list[str]:
        """Tokens that the options name, each of which the tokenizer must have."""
        return []

    def check(self, model_config: dict[str, Any]) -> list[UserError]:
        """What is wrong with the method's options on the model of a `config.json`, found before any weight loads."""
        return []

    def agreement(self) -> dict[str, Any]:
        """Option -> value, where all adapters on one base must have the same."""
        return {}

    def quantization(self) -> str | None:
        """Precision the base must be loaded at (`nf4`), or None when the method does not care."""
        return None

    def against_features(self, features: Features | None) -> str | None:
        """What is wrong with the features of a row, and what is expected; nothing where `traits.reads_features` is not
        set."""
        return None

    def attach(self, tree: PreTrainedModel, trainable: bool) -> Any:
        """Insert the method into `tree`, freeze what it does not train, and return the carrier to call.

        The base's shared tensors stay as they are: same storage, `requires_grad` False.
        """
        raise NotImplementedError

    def parameter_groups(self, tree: torch.nn.Module, lr: float) -> list[dict[str, Any]]:
        """Optimiser groups of the trainable parameters below `tree`; `lr` is the stage's learning rate."""
        return [{"params": [p for p in tree.parameters() if p.requires_grad], "lr": lr}]

    def begin(self, tree: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Called once before the first of a stage's optimiser steps, with their number."""

    def after_step(self, tree: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Called after every optimiser step, for methods that move weights outside autograd."""

    def state(self, carrier: Any) -> dict[str, torch.Tensor]:
        """Tensors beside the trained ones that `after_step` changes; a stage that is resumed copies them back in."""
        return {}

    def count(self, model_config: dict[str, Any]) -> Counts:
        """Parameter counts by closed form from a `config.json`; equal to counting the attached modules."""
        raise NotImplementedError

    def save(self, carrier: Any, folder: Path) -> None:
        """Write the trained tensors into `folder`, in PEFT format where peft knows the method."""
        raise NotImplementedError

    def load(self, tree: PreTrainedModel, folder: Path, trainable: bool) -> Any:
        """Attach the method as saved in `folder`; every tensor must be found, and none may be left over."""
        raise NotImplementedError

    def low_rank_terms(self, carrier: Any) -> LowRankTerms:
        """The adapter's effect as exact low-rank terms per linear layer; only where `traits.low_rank`."""
        raise NotImplementedError

    def merge(self, carrier: Any) -> PreTrainedModel:
        """Fold the method into the weights of its private tree and return that tree; only where `traits.mergeable`."""
        raise NotImplementedError

    def files(self) -> tuple[str, ...]:
        """Names of the files that `save` writes and that a checkpoint must contain."""
        return ("adapter_config.json", "adapter_model.safetensors")
