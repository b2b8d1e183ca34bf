"""What can be set of the optimisation loop, for every stage that runs it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from data_prep.core.options import option


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

    @property
    def rounds_in_blocks(self) -> bool:
        """Whether moments are rounded in blocks, so that parts of a tensor have others than the whole."""
        return self in (Optimizer.adamw_8bit, Optimizer.paged_adamw_8bit)


class Autocast(Enum):
    """Precision of matrix products in forward passes; `auto`: bf16 on CUDA cards that have it, else off."""

    auto = "auto"
    off = "off"
    bf16 = "bf16"


class OnMemory(Enum):
    """What becomes of a stage whose pass does not fit into memory."""

    stop = "stop"
    halve = "halve"


@dataclass
class TrainingOptions:
    """What can be set of the optimisation loop (`align/training/loop.py`)."""

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
    max_grad_norm: float = option(1.0, "gradient norm is clipped to this", above=0, high=math.inf)
    autocast: Autocast = option(
        Autocast.auto,
        "auto|off|bf16: precision of matrix products in every pass of the stage (auto: bf16 on CUDA, else off)",
    )
    on_out_of_memory: OnMemory = option(
        OnMemory.stop,
        "stop with the micro_tokens to set|halve them, and go on from the last kept state (one process)",
    )
    gradient_checkpointing: bool = option(False, "recompute activations in backward to save memory")
    trunk_cache: float | None = option(
        None,
        "GB of a process's main memory for results of the blocks below the lowest trained one, which are then computed "
        "once a row for all roles and passes (0: off; default: 2 on a CPU, 0 on a card, where it is not measured)",
        high=1e6,
    )
    eval_every: int = option(0, "optimiser steps between evaluations (0: four times per run)")
    patience: int = option(0, "stop after this many evaluations without improvement (0: never)")
    save_minutes: float = option(
        10.0, "minutes between states from which a stopped stage goes on; the newest is kept (0: it begins anew)"
    )

    def steps_over(self, rows: int) -> int:
        """Optimiser steps of a run over so many training rows."""
        return self.max_steps or max(1, round(self.steps_in_epoch(rows) * self.epochs))

    def trunk_room(self, device: str) -> int:
        """Bytes of the trunk cache on a kind of device."""
        default = 2.0 if device == "cpu" else 0.0
        return int(1e9 * (default if self.trunk_cache is None else self.trunk_cache))

    def steps_in_epoch(self, rows: int) -> int:
        """Batches that one pass over so many training rows makes."""
        return max(1, rows // self.batch_size)

    def rereads(self, rows: int) -> bool:
        """Whether a run over so many training rows takes some of them several times."""
        return self.steps_over(rows) > self.steps_in_epoch(rows)
