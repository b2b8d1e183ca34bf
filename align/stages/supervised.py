"""What the supervised stages share: one run of the loop with its progress bar and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from align.stages.base import TrainingStage

if TYPE_CHECKING:
    import torch

    from align.checkpoints.checkpoint import Checkpoint
    from align.roles import Role
    from align.training.context import StageContext
    from align.training.objectives import Objective
    from data_prep.prepare.prepare import Prepared

SAMPLED = 64
"""Tokens, at most, of a sample of how a trained policy goes on."""


def supervised_run(
    context: StageContext, objective: Objective, role: Role, prepared: Prepared[Any]
) -> dict[str, float]:
    """Train `objective` over prepared rows; returns the numbers of the evaluation that counts."""
    from align.roles import Role
    from align.tracking.metrics import read_metrics
    from align.training.loop import fit
    from align.training.optimizer import Updater, ready_to_train
    from align.training.regularisers import regularise
    from data_prep.core.progress import Progress

    options = cast(TrainingStage, context.spec.stage)
    steps = options.steps_over(len(prepared.train))
    ready_to_train(role, options)
    regularise(objective, role, options, lambda: context.bases.start_of(context.below, context.parent_mode, "start"))
    updater = Updater(
        objective, groups_of(role, context.lr, options), options, steps, context.accelerator, hooks_of(role)
    )
    record_counts(context, role)
    context.numbers["tokens"] = int(
        sum(row.get("tokens", 0) for row in read_metrics(context.metrics.path))
    )  # if resumed
    others = [each for each in objective.modules() if isinstance(each, Role) and each is not role]
    progress = Progress(context.spec.name, steps, enabled=context.is_main, done=context.saver.step)
    with context.trunk_shared(role, others, again=options.rereads(len(prepared.train))), progress:

        def log(step: int, split: str, numbers: dict[str, float]) -> None:
            if context.is_main:
                context.metrics.log(step, split, numbers)
            if split == "train":
                context.numbers["tokens"] += int(numbers["tokens"])
                progress.advance(1, loss=numbers["loss"])
            else:
                progress.show(eval_loss=numbers["loss"])

        with context.phase("train"):
            return fit(updater, prepared.train, prepared.eval, context.seed, log, context.saver)


def groups_of(role: Role, lr: float, options: TrainingStage, wait: int = 0) -> list[dict[str, Any]]:
    """Optimiser groups of a role: its adapter's own, and its head at the same learning rate, each with its decay.

    The role rests for the first `wait` steps.
    """
    from align.models.sharding import let_go
    from align.training.regularisers import decayed

    assert role.adapter is not None
    let_go(role.tree)
    groups = role.adapter.parameter_groups(role.carrier, lr)
    if role.head is not None:
        groups.append({"params": [p for p in role.head.parameters() if p.requires_grad], "lr": lr})
    return [{**group, "role": role.name, "wait": wait} for group in decayed(role, groups, options)]


@dataclass
class AdapterHook:
    """A role's adapter as the loop calls it: it counts the steps that its role has taken."""

    role: Role
    wait: int = 0
    """First steps in which the role rests."""

    def begin(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Before the first step of a stage."""
        assert self.role.adapter is not None
        self.role.adapter.begin(self.role.carrier, optimizer, steps - self.wait)

    def after_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """After every step of the stage that is one of the role's."""
        assert self.role.adapter is not None
        if step > self.wait:
            self.role.adapter.after_step(self.role.carrier, optimizer, step - self.wait)

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors beside the trained ones that steps change."""
        assert self.role.adapter is not None
        return self.role.adapter.state(self.role.carrier)


def hooks_of(role: Role, wait: int = 0) -> list[AdapterHook]:
    """What the loop calls for a role, which rests for the first `wait` steps."""
    return [AdapterHook(role, wait)]


def record_counts(context: StageContext, role: Role) -> None:
    """Trainable and total parameters of the stage's role, for run.json; the head is counted in both."""
    from align.models.fingerprint import read_model_config

    head = sum(p.numel() for p in role.head.parameters()) if role.head is not None else 0
    context.numbers["trainable"] = sum(p.numel() for p in role.parameters() if p.requires_grad)
    context.numbers["total"] = context.spec.adapter.count(read_model_config(context.bases.folder)).total + head


def save_policy(
    context: StageContext, role: Role, openings: Sequence[tuple[str, list[int]]], probes: Sequence[list[int]]
) -> Checkpoint:
    """Save a trained policy, with samples of how it goes on; `openings` are (row id, token ids)."""
    from align.training.context import write_samples
    from align.training.saving import Result, save_result

    if context.is_main:
        with context.phase("samples"):
            write_samples(context, greedy_samples(context, role, openings))
    result = Result(
        role=role,
        kind="policy",
        parents=[("init", context.init)] if context.init else [],
        probe_ids=[ids[:64] for ids in probes],
        metrics=context.numbers.get("metrics", {}),
        on_parent=context.parent_mode.mode.name if context.parent_mode.mode else None,
    )
    return save_result(context, result, context.staging)


def greedy_samples(
    context: StageContext, role: Role, openings: Sequence[tuple[str, list[int]]]
) -> list[dict[str, Any]]:
    """The openings of rows, and how the model goes on (greedily)."""
    from align.inference.generation import RolloutEngine, Sampling
    from align.training.context import said_features

    prompts = [ids for _, ids in openings]
    engine = RolloutEngine(role, context.renderer.end_token_id)
    room = (context.context or 1 << 30) - max(len(prompt) for prompt in prompts)
    with context.autocast():
        replies = engine.generate(prompts, Sampling(min(SAMPLED, room), greedy=True))
    decode = context.renderer.decode
    return [
        {
            "id": name,
            **said_features(prompt),
            "prompt": decode(prompt),
            "reply": decode(reply.ids),
            "ended": reply.finished,
        }
        for (name, prompt), reply in zip(openings, replies, strict=True)
    ]
