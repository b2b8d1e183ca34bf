"""One optimiser step over micro-batches, clipped and scheduled, on one process or many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from align.models.memory import told_of
from align.models.sharding import held, let_go, part_like
from align.roles import Role
from align.training.objectives import Batch, Objective
from align.training.options import Autocast, Optimizer, Schedule, TrainingOptions
from data_prep.core.errors import TrainingStopped, UserError
from data_prep.core.interrupts import interrupts


class StepHook(Protocol):
    """What wants to know of the optimiser's steps: an adapter, bound to its tree."""

    def begin(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Called before the first of `steps` steps."""

    def after_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Called after step `step`, counted from 1; gradients are still there."""

    def state(self) -> dict[str, Tensor]:
        """Tensors beside the trained ones that steps change, as they are held."""


def learning_rate_factor(step: int, total: int, warmup: int, schedule: Schedule) -> float:
    """Share of the peak learning rate used by optimiser step `step` (from 0) of `total`.

    Linear rise over `warmup` steps, then constant, linear to zero, or half a cosine to zero.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if schedule is Schedule.linear:
        return max(0.0, 1.0 - done)
    if schedule is Schedule.cosine:
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return 1.0


def make_optimizer(groups: list[dict[str, Any]], options: TrainingOptions) -> torch.optim.Optimizer:
    """The optimiser a stage asks for; groups carry their own learning rates."""
    if not any(group["params"] for group in groups):
        raise UserError("nothing to train: the adapter leaves no trainable parameter")
    adam: dict[str, Any] = {"betas": (0.9, options.beta2), "eps": options.eps, "weight_decay": options.weight_decay}
    if options.optimizer is Optimizer.sgd:
        return torch.optim.SGD(groups, weight_decay=options.weight_decay)
    if options.optimizer is Optimizer.adamw:
        return torch.optim.AdamW(groups, fused=True, **adam)
    from bitsandbytes import optim

    names = {Optimizer.adamw_8bit: "AdamW8bit", Optimizer.paged_adamw_8bit: "PagedAdamW8bit"}
    kind = getattr(optim, names[options.optimizer])
    optimizer: torch.optim.Optimizer = kind(groups, **adam)
    return optimizer


def is_narrow(options: TrainingOptions, device: torch.device) -> bool:
    """Whether a stage takes its matrix products in bfloat16 on a device."""
    if options.autocast is Autocast.auto:
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return options.autocast is Autocast.bf16


def autocast(options: TrainingOptions, device: torch.device) -> AbstractContextManager[Any]:
    """Context of every forward pass of a stage: matrix products at the precision that its options say."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if is_narrow(options, device) else nullcontext()


def ready_to_train(role: Role, options: TrainingOptions) -> None:
    """Switch on what the stage's options ask of the tree."""
    if options.gradient_checkpointing:
        role.tree.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def shared_module(objective: Objective, accelerator: Accelerator) -> nn.Module:
    """The objective as several processes train it: gradients are added up, and nothing else is sent.

    All processes load the same frozen tensors, and buffers change by rules alone: none is broadcast. Gradients of
    weights that are cut are FSDP2's, which adds up each process's rows after every pass.
    """
    every = dict(objective.named_parameters(remove_duplicate=False))
    summed = [name for name, p in every.items() if p.requires_grad and not isinstance(p, DTensor)]
    if accelerator.num_processes == 1 or not summed:
        return objective
    still = [*(every.keys() - summed), *(name for name, _ in objective.named_buffers(remove_duplicate=False))]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, still)
    return DistributedDataParallel(objective)  # accelerate's own way takes no parts of tensors


class Updater:
    """Takes optimiser steps: accumulation, distributed sums, clipping, schedule, adapter hooks, stop on NaN.

    A group with a key `wait` rests for so many steps: its parameters, moments and weight decay stay as they are.
    """

    def __init__(
        self,
        objective: Objective,
        groups: list[dict[str, Any]],
        options: TrainingOptions,
        steps: int,
        accelerator: Accelerator,
        hooks: Sequence[StepHook] = (),
    ) -> None:
        self.objective = objective
        self.options = options
        self.accelerator = accelerator
        self.steps = steps
        self.step_number = 0
        self.optimizer = make_optimizer(groups, options)
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        self._warmup = round(options.warmup * steps)
        self._hooks = hooks
        self._asked = False
        self._in_parts = any(isinstance(p, DTensor) for p in objective.parameters())
        self.trains_parts = any(isinstance(p, DTensor) and p.requires_grad for p in objective.parameters())
        """Whether each process has a part of what is trained, and of its moments."""
        self._module = shared_module(objective, accelerator)
        self._clip_groups = objective.clip_groups()
        for hook in hooks:
            hook.begin(self.optimizer, steps)

    @property
    def ends(self) -> bool:
        """Whether a signal has asked the run to end: all processes agree, which heard of it in a step they took."""
        return interrupts.wanted if self.accelerator.num_processes == 1 else self._asked

    def agreed(self, wish: bool) -> bool:
        """Whether one of the processes wishes it; all ask."""
        return bool(self._sums([float(wish)])[0])

    def go_to(self, step: int) -> None:
        """Leave out the steps before `step`; schedule and adapters go on as after so many steps without gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        while self.step_number < step:
            self.step_number += 1
            for hook in self._hooks:
                hook.after_step(self.optimizer, self.step_number)

    def step(self, window: Sequence[Batch], counts: bool = True) -> dict[str, float]:
        """One optimiser step over a window of micro-batches; returns its loss, gradient norms and numbers.

        A process without a share of its own takes part with rows that do not count (`counts`).

        Raises:
            TrainingStopped: a loss or gradient is not finite; weights are as before the step.
        """
        device = self.accelerator.device
        units = float(sum(batch.weight for batch in window)) if counts else 0.0
        weight, asked = self._sums([units, float(interrupts.wanted)])
        self._asked |= bool(asked)
        passes = [(batch, counts) for batch in window] + [(window[0], False)] * self._lacking(len(window))
        totals: dict[str, Tensor] = {}
        self.optimizer.zero_grad(set_to_none=True)
        self._survey(window if counts else ())
        for number, (batch, own) in enumerate(passes):
            last = number == len(passes) - 1
            sync = nullcontext() if last else self.accelerator.no_sync(self._module)
            with sync, told_of(batch.packed.tokens):
                with autocast(self.options, device):
                    loss, numbers = self._module(batch.to(device))
                (loss * (self.accelerator.num_processes * own / weight)).backward()
            numbers = {"loss": loss.detach(), **numbers}
            accumulate(totals, numbers if own else {name: value * 0.0 for name, value in numbers.items()})
        result, norms = self._averaged(totals, weight, [self._clip(group) for group in self._clip_groups])
        result |= {f"grad_norm_{i}" if i else "grad_norm": norm for i, norm in enumerate(norms)}
        self._stop_on_nan(result, norms, window)
        if self.step_number == 0:
            self._require_gradients()
        factor = self.rate_factor()
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
            if self.step_number < group.get("wait", 0):
                for parameter in group["params"]:
                    parameter.grad = None
        self.optimizer.step()
        self.step_number += 1
        for hook in self._hooks:
            hook.after_step(self.optimizer, self.step_number)
        result["lr"] = self._peaks[0] * factor
        return result

    def held(self) -> dict[str, Tensor]:
        """Every tensor that steps change, by name, as it is held."""
        if self.trains_parts:
            let_go(self.objective)
        found = {name: p.detach() for name, p in self.objective.named_parameters() if p.requires_grad}
        for number, hook in enumerate(self._hooks):
            found |= {f"hook {number}: {name}": value for name, value in hook.state().items()}
        return found

    def weights(self) -> dict[str, Tensor]:
        """A copy of every tensor that steps change."""
        return {name: value.clone() for name, value in self.held().items()}

    @torch.no_grad()
    def put_back(self, tensors: dict[str, Tensor]) -> None:
        """Give every tensor that steps change the value that it has here, by name."""
        for name, own in self.held().items():
            own.copy_(part_like([tensors[name]], own))

    def load_moments(self, state: dict[str, Any]) -> None:
        """Give the optimiser a state that `state_dict` gave, whoever held what of it then."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for number, moments in state["state"].items():
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.shape == parameters[number].shape:
                    moments[name] = part_like([value], parameters[number])
        self.optimizer.load_state_dict(state)

    def rate_factor(self) -> float:
        """Share of the groups' learning rates that the coming step takes."""
        return learning_rate_factor(self.step_number, self.steps, self._warmup, self.options.schedule)

    def evaluate(self, micro_batches: Sequence[Batch], counts: bool = True) -> dict[str, float]:
        """Mean loss and numbers over this process's share of the evaluation rows, combined over all processes.

        A process without a share of its own still takes part, with rows that do not count.
        """
        return self.weighed(micro_batches, counts)[0]

    @torch.no_grad()
    def weighed(self, micro_batches: Sequence[Batch], counts: bool = True) -> tuple[dict[str, float], float]:
        """What `evaluate` returns, and the units it is a mean of."""
        device = self.accelerator.device
        totals: dict[str, Tensor] = {}
        self.objective.eval()
        self._survey(micro_batches if counts else ())
        for batch in micro_batches:
            with autocast(self.options, device), told_of(batch.packed.tokens):
                loss, numbers = self.objective(batch.to(device))
            numbers = {"loss": loss, **numbers}
            accumulate(totals, numbers if counts else {name: value * 0.0 for name, value in numbers.items()})
        self.objective.train()
        own = sum(batch.weight for batch in micro_batches) if counts else 0.0
        (weight,) = self._sums([float(own)])
        result, _ = self._averaged(totals, weight)
        if not math.isfinite(result["loss"]):
            raise TrainingStopped(
                f"held-out loss {result['loss']} is not finite after step {self.step_number}",
                code="not_finite",
                hint="lower the learning rate, or look at the evaluation rows",
            )
        return result, weight

    def _survey(self, window: Sequence[Batch]) -> None:
        """Let the objective see what is coming, at the precision of its forward passes."""
        with autocast(self.options, self.accelerator.device):
            self.objective.survey(window, self._reduce)

    def _lacking(self, passes: int) -> int:
        """How many passes another process makes more than this one: layers that are cut are sent in each of them."""
        if not self._in_parts:
            return 0
        return int(self.accelerator.gather(torch.tensor([passes], device=self.accelerator.device)).max()) - passes

    def _clip(self, parameters: list[nn.Parameter]) -> Tensor:
        """Scale gradients down to the largest norm allowed; the norm that they had, over all processes' parts."""
        most = self.options.max_grad_norm
        gradients = [p.grad for p in parameters if p.grad is not None]
        cut = [held(each) for each in gradients if isinstance(each, DTensor)]
        if not cut:
            return torch.nn.utils.clip_grad_norm_(parameters, most)
        whole = [each for each in gradients if not isinstance(each, DTensor)]
        squares = [torch.nn.utils.get_total_norm(some).double().square() for some in (whole, cut)]
        norm = (squares[0].to(cut[0].device) + self._reduce(squares[1])).sqrt()
        factor = (most / (norm + 1e-6)).clamp(max=1.0)
        for each in (*whole, *cut):
            each.mul_(factor.to(each.dtype))
        return norm

    def _sums(self, values: list[float]) -> list[float]:
        """Sums of numbers over all processes; one alone does not ask its device."""
        if self.accelerator.num_processes == 1:
            return values
        found: list[float] = self._reduce(torch.tensor(values, device=self.accelerator.device)).tolist()
        return found

    def _reduce(self, value: Tensor) -> Tensor:
        value = value.double()
        return self.accelerator.reduce(value, "sum") if self.accelerator.num_processes > 1 else value

    def _averaged(
        self, totals: dict[str, Tensor], weight: float, norms: Sequence[Tensor] = ()
    ) -> tuple[dict[str, float], list[float]]:
        """Totals of all processes over their weight, and norms as they are: read from the device at once."""
        device = self.accelerator.device
        whole = [self._largest(x) if name.startswith("max_") else self._reduce(x) for name, x in totals.items()]
        read = torch.stack([value.reshape(()).to(device, torch.float64) for value in [*whole, *norms]]).tolist()
        sums = zip(totals, read, strict=False)
        found = {name: value if name.startswith("max_") else value / weight for name, value in sums}
        return found, read[len(totals) :]

    def _largest(self, value: Tensor) -> Tensor:
        gathered = self.accelerator.gather(value.reshape(1)) if self.accelerator.num_processes > 1 else value
        return gathered.max()

    def _stop_on_nan(self, result: dict[str, float], norms: list[float], window: Sequence[Batch]) -> None:
        if math.isfinite(result["loss"]) and all(math.isfinite(norm) for norm in norms):
            return
        rows = [name for batch in window for name in batch.ids]
        shown = ", ".join(rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
        raise TrainingStopped(
            f"loss {result['loss']} or gradient norm {norms} is not finite at step {self.step_number + 1} "
            f"(rows {shown}); the weights before this step are kept out of the run folder",
            code="not_finite",
            hint="lower the learning rate, or look at these rows",
        )

    def _require_gradients(self) -> None:
        """Run-time guard of the first step: every trainable tensor of the optimiser has received a gradient."""
        without = [n for n, p in self.objective.named_parameters() if p.requires_grad and p.grad is None]
        if without:
            raise TrainingStopped(
                f"{len(without)} trainable tensors received no gradient (first: {without[0]})", code="no_gradient"
            )


def accumulate(totals: dict[str, Tensor], numbers: dict[str, Tensor]) -> None:
    """Add micro-batch numbers to running totals (`max_*` by maximum), in float64."""
    for name, value in numbers.items():
        value = value.detach().double()
        if name not in totals:
            totals[name] = value
        else:
            totals[name] = torch.maximum(totals[name], value) if name.startswith("max_") else totals[name] + value
