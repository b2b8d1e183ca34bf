"""Replies of a policy to given prompts, outside of PPO's updates: for evaluation, and for pairs made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from align.config.schema import Load

if TYPE_CHECKING:
    from align.checkpoints.checkpoint import Checkpoint
    from align.inference.generation import Reply, Sampling
    from align.roles import Role
    from align.training.context import StageContext


def frozen_policy(context: StageContext, checkpoint: Checkpoint | None) -> Role:
    """A policy of a chain as it was trained, or the base, frozen."""
    from align.roles import Role

    load = context.parent_mode.load if checkpoint is None or checkpoint.foreign else Load(checkpoint.load)
    if checkpoint is not None:
        return context.bases.realise(checkpoint, "policy", load)
    return Role("policy", context.bases.root(load).tree(), None).freeze()


def in_batches(context: StageContext, count: int, size: int, work: Callable[[int], list[Any]]) -> list[Any]:
    """What `work` makes of every batch of so many rows, by its first row; the processes divide the batches."""
    from align.training.processes import divided

    return [one for part in divided(context.accelerator, range(0, count, size), work) for one in part]


def replies_to(
    context: StageContext,
    role: Role,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    size: int,
    tell: Callable[[int], object] = lambda done: None,
) -> list[Reply]:
    """The role's replies to prompts, so many at a time; draws are a function of seed and batch.

    Args:
        tell: is told how many more there are, of all processes as far as this one knows.
    """
    import torch

    from align.inference.generation import RolloutEngine
    from align.training.batching import seed_at

    engine = RolloutEngine(role, context.renderer.end_token_id)
    generator = torch.Generator(device=context.accelerator.device)

    def replies(start: int) -> list[Reply]:
        batch = start // size  # each has its own draws, so that any process may take it
        generator.manual_seed(seed_at(context.seed, batch, 0) if batch else context.seed)
        found = engine.generate(prompts[start : start + size], sampling, generator)
        tell(len(found) * context.accelerator.num_processes)
        return found

    with context.answering(role):
        return in_batches(context, len(prompts), size, replies)
