"""TRL's trainers and our optimiser steps on the same rows in turns, and the random model and rows both are given."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from common import SIZES, Clock, Measured, lengths, model_of
from transformers import TrainerCallback

from align.adapters.lora import Lora
from align.config.schema import Load
from align.models.own_modules import put_in
from align.models.shared_base import BaseIdentity, SharedBase
from align.roles import Role
from align.stages.base import TrainingStage
from align.stages.supervised import groups_of, hooks_of
from align.training.objectives import Objective
from align.training.optimizer import Updater
from align.training.options import Autocast, Schedule

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
RANK, BATCH, LR = 16, 8, 1e-4
GROUPED = {"train_sampling_strategy": "group_by_length"}
SETTINGS: dict[str, tuple[dict[str, Any], Autocast]] = {
    "defaults": ({}, Autocast.bf16),
    "fp32": ({"bf16": False, "gradient_checkpointing": False, **GROUPED}, Autocast.off),
    "bf16": ({"gradient_checkpointing": False, **GROUPED}, Autocast.bf16),
}
"""What TRL is told, and the precision of our side: its defaults (bf16 autocast, activations computed again, rows in
random order), and the best setting of each precision (rows grouped by length, activations kept)."""


def tokenizer(vocabulary: int) -> Any:
    """A tokenizer of the words t2, t3, ...; where rows are token ids already, TRL asks it for special tokens alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "</s>": 1, **{f"t{number}": number for number in range(2, vocabulary)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


def drawn(count: int, middle: float, highest: int, spread: float, seed: int, size: str) -> list[list[int]]:
    """Token rows of lognormal lengths."""
    draw = random.Random(seed)
    every = lengths(count, 10, highest, middle, spread, seed)
    return [[draw.randrange(2, SIZES[size][3]) for _ in range(length)] for length in every]


def peer_config(parent: type, steps: int, setting: str, **more: Any) -> Any:
    """TRL's arguments of a setting."""
    given: dict[str, Any] = {**SETTINGS[setting][0], **more}
    return parent(
        output_dir="bench_out",
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        learning_rate=LR,
        lr_scheduler_type="constant",
        disable_tqdm=True,
        seed=0,
        **given,
    )


def own_side(
    size: str, stage: type[TrainingStage], setting: str, objective: Callable[[Role], Objective], head: Any = None
) -> tuple[Role, Updater]:
    """Our role and its optimiser steps, as the stages build them."""
    base = SharedBase.freeze(model_of(size), BaseIdentity("random", None, "0"), Load.fp32)
    put_in(base.model)
    lora = Lora(rank=RANK, alpha=2.0 * RANK)
    role = Role("policy", lora.attach(base.tree(), trainable=True), lora, head)
    options = stage(lr=LR, schedule=Schedule.constant, warmup=0.0, batch_size=BATCH, autocast=SETTINGS[setting][1])  # type: ignore[call-arg]
    goal = objective(role).train()
    return role, Updater(goal, groups_of(role, LR, options), options, 10**6, Accelerator(cpu=True), hooks_of(role))


def copy_adapter(theirs: torch.nn.Module, ours: torch.nn.Module) -> None:
    """TRL's LoRA tensors into ours, by the name of their layer."""

    def key(name: str) -> str:
        return name[name.index("layers.") :].replace(".default", "")

    values = {key(name): value for name, value in theirs.named_parameters() if ".lora_" in name}
    own = {key(name): value for name, value in ours.named_parameters() if ".lora_" in name}
    assert own.keys() == values.keys() and own
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(values[name])


class Turns(TrainerCallback):
    """Lets our side take the step that the trainer has just taken, on the same rows; the first two are not counted."""

    def __init__(self, trainer: Any, updater: Updater, rows_of: Callable[[Any], Sequence[Any]]) -> None:
        self.updater, self.rows_of = updater, rows_of
        self.found = {"align": Measured(), "TRL": Measured()}
        self.losses: list[tuple[float, float]] = []
        self.tokens: list[int] = []
        self._inputs: Any = None
        self._clock: Clock | None = None
        inner = trainer.training_step

        def training_step(model: Any, inputs: Any, *more: Any, **others: Any) -> Any:
            self._inputs = copy.copy(inputs)
            self._loss = inner(model, inputs, *more, **others)
            return self._loss

        trainer.training_step = training_step
        trainer.add_callback(self)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """TRL's step begins, where its last one has ended: reading its rows counts."""
        self._clock = self._clock or Clock()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """TRL's step is done; ours follows."""
        theirs, own = Measured(), Measured()
        assert self._clock is not None
        self._clock.into(theirs)
        rows = self.rows_of(self._inputs)
        clock = Clock()
        numbers = self.updater.step([self.updater.objective.collate(rows)])
        clock.into(own)
        self.losses.append((numbers["loss"], float(self._loss)))
        if len(self.losses) > 2:
            for name, one in (("align", own), ("TRL", theirs)):
                self.found[name].seconds += one.seconds
                self.found[name].added_bytes += one.added_bytes
            self.tokens.append(int(self._inputs["attention_mask"].sum()))
        self._clock = Clock()

    def told(self) -> str:
        """How far the losses of the two sides are apart, in a sentence."""
        gap = max(abs(a - b) / abs(b) for a, b in self.losses)
        return f"Losses of {len(self.losses)} steps differ by at most {gap:.0e} of their size."
