"""The stage protocol: a stage turns a checkpoint and a data set into a checkpoint.

A stage is a dataclass whose fields are Hydra options (`stages.NAME.FIELD=VALUE`). It lives in one file of this folder
and registers itself with `@stage("name")`. Importing a stage must not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from align.fields import option
from data_prep.errors import UserError
from data_prep.options import KEEP_HELP, MAX_LOST_HELP, ON_LONG_ANSWER_HELP, ON_LONG_HELP, Keep, OnLong, OnLongAnswer
from data_prep.registry import Registry

if TYPE_CHECKING:
    from align.adapters.base import Adapter
    from align.chain import Standing
    from align.checkpoint import Checkpoint
    from align.work import Work
    from data_prep.options import DataOptions

StageT = TypeVar("StageT", bound="type[Stage]")

stages: Registry[Stage] = Registry("stage", "align.stages")


# How a stage stands on its parent: `continue` is a Python keyword, hence the functional form.
OnParent = Enum("OnParent", ["auto", "continue", "stack", "merge"])


UNUSUAL = 30.0
"""A learning rate this many times above or below the usual one is warned of."""


class Schedule(Enum):
    """Course of the learning rate after warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Optimizer(Enum):
    """Optimisers; the 8-bit ones are bitsandbytes'."""

    adamw = "adamw"
    adamw_8bit = "adamw_8bit"
    paged_adamw_8bit = "paged_adamw_8bit"
    sgd = "sgd"


class Autocast(Enum):
    """Precision of matrix products in forward passes."""

    off = "off"
    bf16 = "bf16"


def stage(name: str) -> Callable[[StageT], StageT]:
    """Register a stage under `name`, as a Hydra choice of the group `stage` too."""

    def register(cls: StageT) -> StageT:
        from hydra.core.config_store import ConfigStore

        ConfigStore.instance().store(group="stage", name=name, node=cls)
        stages.register(name)(cls)
        return cls

    return register


@dataclass
class Stage:
    """What every stage takes: where it starts from, on which data, with which adapter."""

    name: ClassVar[str]
    needs_data: ClassVar[tuple[str, ...]] = ()
    """Kinds of data it reads: conversations, preferences, prompts, text."""
    may_read: ClassVar[tuple[str, ...]] = ()
    """Kinds of data it also reads where they are given."""
    needs_reward: ClassVar[bool] = False
    """Whether it takes a reward model beside its parent."""
    reward_optional: ClassVar[bool] = False
    """Whether it also works without that reward model."""
    makes: ClassVar[str | None] = None
    """Role of the checkpoint it makes: policy or reward; None where it makes none."""
    has_head: ClassVar[bool] = False
    """Whether its checkpoint has a scalar head beside the adapter."""

    init: str | None = option(
        None,
        "checkpoint to start from: a stage, RUN/STAGE, a path, or base (default: the run's latest policy)",
    )
    reward: str | None = option(None, "reward model for stages that take one (default: the run's reward_model)")
    on_parent: OnParent = option(OnParent.auto, "how a new adapter stands on the parent: auto|continue|stack|merge")
    data: Any = option(None, "data recipe of this stage alone (default: the run's data)")
    adapter: Any = option(None, "adapter of this stage alone (default: the run's adapter)")

    def run(self, work: Work) -> Checkpoint | None:
        """Do the stage's work inside `work.staging`; returns the checkpoint written there, if it makes one."""
        raise NotImplementedError

    @property
    def reply_tokens(self) -> int:
        """Tokens that a prompt leaves free for the reply."""
        return int(getattr(self, "max_new_tokens", 0))

    def refusals(self, where: str, adapter: Adapter, reward: Standing | None) -> Iterator[UserError]:
        """Settings that cannot work, known before anything is read; `where` is `stages.NAME`."""
        yield from ()

    def data_refusals(self, data: DataOptions) -> Iterator[UserError]:
        """What is wrong with what the stage reads besides rows."""
        yield from ()

    def check_rows(self, where: str, count: int) -> None:
        """Raise UserError where so many training rows are too few."""

    def doubts(self, where: str, adapter: Adapter, lr_scale: float) -> Iterator[UserError]:
        """Settings that work but are hardly meant: `align check` warns of them, `align run` takes them."""
        yield from ()


@dataclass
class TrainingStage(Stage):
    """Options of every stage that runs the optimisation loop of `align/training.py`."""

    base_lr: ClassVar[float] = 2e-4
    """Peak learning rate of a LoRA adapter on a model of billions of parameters, where the option is not set."""
    trains_head: ClassVar[bool] = False
    """Whether it trains a score head."""

    lr: float | None = option(
        None, "peak learning rate (default: the stage's x the adapter's factor x model.lr_scale)", above=0
    )
    schedule: Schedule = option(Schedule.cosine, "learning rate after warm-up: constant|linear|cosine (to zero)")
    warmup: float = option(0.05, "share of the steps with rising learning rate", high=1)
    epochs: float = option(1.0, "passes over the training rows", above=0)
    max_steps: int = option(0, "stop after this many optimiser steps (0: as epochs say)")
    batch_size: int = option(32, "rows per optimiser step, over all processes", low=1)
    micro_batch_size: int = option(0, "rows per forward pass of one process (0: the whole share of the batch)")
    micro_tokens: int = option(
        0, "tokens per forward pass: rows are packed best-fit into as few as hold them, the largest first (0: off)"
    )
    optimizer: Optimizer = option(Optimizer.adamw, "adamw|adamw_8bit|paged_adamw_8bit|sgd")
    weight_decay: float = option(0.0, "decoupled weight decay of trained weights; not of biases and norms")
    head_decay: float | None = option(None, "weight decay of the score head (default: weight_decay)", low=0)
    embedding_decay: float | None = option(None, "weight decay of trained embeddings (default: weight_decay)", low=0)
    norm_decay: float = option(0.0, "weight decay of biases and norms")
    neftune: float = option(0.0, "strength alpha of noise on the embeddings while training (usual: 5; not in PPO)")
    embedding_drift: float = option(0.0, "weight of the penalty on trained embeddings' distance from the start's")
    hidden_drift: float = option(0.0, "weight of the penalty on last hidden states' distance from the start's")
    beta2: float = option(0.999, "second-moment decay of Adam", below=1)
    eps: float = option(1e-8, "denominator constant of Adam", above=0)
    max_grad_norm: float = option(1.0, "gradient norm is clipped to this", above=0)
    autocast: Autocast = option(Autocast.off, "off|bf16: precision of matrix products during training")
    gradient_checkpointing: bool = option(False, "recompute activations in backward to save memory")
    eval_every: int = option(0, "optimiser steps between evaluations (0: four times per run)")
    patience: int = option(0, "stop after this many evaluations without improvement (0: never)")
    save_minutes: float = option(
        10.0, "minutes between states from which a stopped stage goes on; the newest is kept (0: it begins anew)"
    )
    max_length: int = option(1024, "longest row in tokens", low=2)
    on_long: OnLong = option(OnLong.drop, ON_LONG_HELP)
    on_long_answer: OnLongAnswer | None = option(None, ON_LONG_ANSWER_HELP)
    keep_prompt: Keep = option(Keep.end, KEEP_HELP)
    max_lost: float = option(0.05, MAX_LOST_HELP, high=1)

    def peak_lr(self, adapter: Adapter, lr_scale: float) -> float:
        """Peak learning rate with this adapter on a model of this scale: as set, else the stage's default for both."""
        return self.lr if self.lr is not None else self.usual_lr(adapter, lr_scale)

    def usual_lr(self, adapter: Adapter, lr_scale: float) -> float:
        """The learning rate where none is set."""
        return self.base_lr * adapter.lr_factor * lr_scale

    def steps_over(self, rows: int) -> int:
        """Optimiser steps of a run over so many training rows."""
        return self.max_steps or max(1, round(self.steps_in_epoch(rows) * self.epochs))

    def steps_in_epoch(self, rows: int) -> int:
        """Batches that one pass over so many training rows makes."""
        return max(1, rows // self.batch_size)

    def plan_over(self, rows: int) -> dict[str, float]:
        """What `align check` says of the work over so many training rows."""
        return {"steps": self.steps_over(rows), "rows_per_step": min(self.batch_size, rows), "epochs": self.epochs}

    def refusals(self, where: str, adapter: Adapter, reward: Standing | None) -> Iterator[UserError]:
        """Options that the method or the stage has no use for."""
        yield from self.against_method(where, adapter)
        if self.head_decay is not None and not self.trains_head:
            yield UserError("this stage trains no score head", field=f"{where}.head_decay", code="no_effect")
        for name in ("embedding_drift", "embedding_decay"):
            if getattr(self, name) and not adapter.traits.owns_weights:
                yield UserError(
                    f"{getattr(adapter, 'method', type(adapter).__name__)} trains no embeddings",
                    field=f"{where}.{name}",
                    code="no_effect",
                    hint=f"leave it out, or take adapter=full; {where}.hidden_drift works with every method",
                )

    def against_method(self, where: str, adapter: Adapter) -> Iterator[UserError]:
        """Recomputing activations is not possible with every method."""
        if self.gradient_checkpointing and not adapter.traits.gradient_checkpointing:
            name = getattr(adapter, "method", type(adapter).__name__)
            yield UserError(
                f"{name} does not work with gradient checkpointing",
                field=f"{where}.gradient_checkpointing",
                code="illegal_method",
                hint=f"set {where}.gradient_checkpointing=false and a smaller {where}.micro_batch_size",
            )

    def doubts(self, where: str, adapter: Adapter, lr_scale: float) -> Iterator[UserError]:
        """A learning rate far from the usual one."""
        usual = self.usual_lr(adapter, lr_scale)
        if self.lr is not None and not usual / UNUSUAL <= self.lr <= usual * UNUSUAL:
            times = f"{self.lr / usual:.3g} times" if self.lr > usual else f"1/{usual / self.lr:.3g} of"
            yield UserError(
                f"{self.lr:g} is {times} the usual learning rate of this stage and method ({usual:g})",
                field=f"{where}.lr",
                code="unusual_value",
                hint="leave it out to take the usual one",
            )
