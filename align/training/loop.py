"""The only optimisation loop: windows of micro-batches, one optimiser step each, on one process or many.

A window's loss is its sum over units (tokens, pairs) divided by the units of the whole window over all processes, so
the gradient does not depend on how a batch is cut into micro-batches or spread over processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from align.training.batching import Windows, cut, rows_at, seed_at
from align.training.optimizer import Updater
from align.training.resume import StateSaver
from data_prep.core.errors import UserError
from data_prep.prepare.arrow_rows import lengths_of

if TYPE_CHECKING:
    from align.training.objectives import Batch

RowT = TypeVar("RowT")
MOST_TASKS = 50
"""With more, rows are not told apart: a column of this name then holds something else."""


@dataclass
class Best:
    """The best evaluation so far and the weights that gave it."""

    loss: float = math.inf
    step: int = 0
    state: dict[str, Tensor] | None = None
    misses: int = 0

    def offer(self, loss: float, step: int, keep: Callable[[], dict[str, Tensor]]) -> None:
        """Record an evaluation, and the weights when it is the best so far."""
        if loss < self.loss:
            self.loss, self.step, self.state, self.misses = loss, step, keep(), 0
        else:
            self.misses += 1


def fit(
    updater: Updater,
    train: Sequence[RowT],
    held_out: Sequence[RowT],
    seed: int,
    log: Callable[[int, str, dict[str, float]], None],
    saver: StateSaver | None = None,
) -> dict[str, float]:
    """Run a supervised objective to the end of its schedule, or until evaluations stop improving.

    `log(step, split, numbers)` is called after every step ("train") and evaluation ("eval", with NAME/TASK where rows
    name several tasks). With patience, the best weights are put back at the end. With a keeper, it goes on where an
    earlier run was stopped. Returns the last (or best) evaluation's numbers; empty without held-out rows.
    """
    options, process = updater.options, updater.accelerator
    objective = updater.objective
    every = options.eval_every or max(1, math.ceil(updater.steps / 4))
    kept = saver.restore(updater) if saver is not None else {}
    best, final = Best(**kept.get("best", {})), dict[str, float]()
    objective.train()
    held = _held_out(updater, held_out)
    windows = Windows(lengths_of(train), options, seed, process.num_processes)
    begins_with = int(kept.get("begins_with", -1))  # other passes than those that it was begun with have another
    begins_with = windows.begins_with() if begins_with < 0 else begins_with
    epoch, first = divmod(updater.step_number, windows.steps)
    while updater.step_number < updater.steps:
        for window in windows.epoch(epoch, first, begins_with):
            if not all(window.passes):
                raise UserError(f"{len(train)} training rows cannot be spread over {process.num_processes} processes")
            own = rows_at(train, window.passes[process.process_index])
            torch.manual_seed(seed_at(seed, updater.step_number, process.process_index))  # of dropout
            numbers = updater.step([objective.collate(rows) for rows in own])
            numbers["tokens"] = float(window.tokens)
            if options.micro_tokens:
                numbers["micro_batches"] = float(sum(map(len, window.passes)))
            log(updater.step_number, "train", numbers)
            done = updater.step_number >= updater.steps
            if held.parts and (done or updater.step_number % every == 0):
                final = held.evaluate()
                log(updater.step_number, "eval", final)
                if options.patience:
                    best.offer(final["loss"], updater.step_number, updater.weights)
            if done or (options.patience and best.misses >= options.patience):
                return _finish(updater, best, final, held.evaluate)
            if saver is not None:
                saver.offer(updater, updater.step_number, {"best": vars(best), "begins_with": begins_with})
        epoch, first = epoch + 1, 0
    return final


def _finish(
    updater: Updater, best: Best, final: dict[str, float], evaluate: Callable[[], dict[str, float]]
) -> dict[str, float]:
    if best.state is None:
        return final
    updater.put_back(best.state)
    return {**evaluate(), "best_step": float(best.step)}


def _held_out(updater: Updater, rows: Sequence[Any]) -> HeldOut:
    options, process = updater.options, updater.accelerator
    size = options.micro_batch_size or (0 if options.micro_tokens else options.batch_size)
    options = replace(options, micro_batch_size=size)
    parts = {}
    for task, every in by_task(rows).items():
        own = every[process.process_index :: process.num_processes]
        counted = own or every[:1]
        passes = rows_at(counted, cut(lengths_of(counted), options))
        parts[task] = [updater.objective.collate(one) for one in passes], bool(own)
    return HeldOut(updater, parts)


def by_task(rows: Sequence[RowT]) -> dict[str, list[RowT]]:
    """Rows by what they name as their task, in the order of the names; '' where they name none."""
    found: dict[str, list[RowT]] = {}
    for row in rows:
        found.setdefault(getattr(row, "task", None) or "", []).append(row)
    return dict(sorted(found.items())) if len(found) <= MOST_TASKS else {"": list(rows)}


@dataclass
class HeldOut:
    """Evaluation batches by task."""

    updater: Updater
    parts: dict[str, tuple[list[Batch], bool]]
    """Task -> this process's micro-batches, and whether they count."""

    def evaluate(self) -> dict[str, float]:
        """Numbers over all rows and, where there are several tasks, of each of them as NAME/TASK."""
        found = {task: self.updater.weighed(*part) for task, part in self.parts.items()}
        if len(found) == 1:
            return next(iter(found.values()))[0]
        units = sum(weight for _, weight in found.values())
        names = [name for name in next(iter(found.values()))[0] if all(name in part for part, _ in found.values())]
        numbers = {name: sum(part[name] * weight for part, weight in found.values()) / units for name in names}
        return numbers | {
            f"{name}/{task or 'other'}": value for task, (part, _) in found.items() for name, value in part.items()
        }
