"""The rollout half of a PPO update: which prompts, which replies, and how the KL coefficient follows its target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from align.inference.generation import Reply, RolloutEngine, Sampling
from align.inference.scoring import score_replies
from align.rl.experience import Experience, PPORoles, RewardRule, collect
from align.training.batching import batches, in_order, seed_at
from align.training.context import write_samples

if TYPE_CHECKING:
    from align.rl.options import PPOOptions
    from align.training.context import StageContext
    from data_prep.types import PromptTokens


_SAMPLES = 16  # replies of an update that are kept to be read


class Rollouts:
    """Draws each update's prompts (a function of seed and update alone) and samples one reply for each."""

    def __init__(
        self, context: StageContext, prompts: Sequence[PromptTokens], roles: PPORoles, options: PPOOptions
    ) -> None:
        self._work = context
        self._prompts = prompts
        self._roles = roles
        self._options = options
        self._engine = RolloutEngine(roles.policy, context.renderer.end_token_id, context.renderer.pad_token_id)
        self._latest: list[tuple[PromptTokens, Reply]] = []
        self._sampling = Sampling(options.max_new_tokens, options.temperature)

    def collect(self, update: int, rule: RewardRule) -> Experience:
        """This process's share of an update's experience; statistics are means over all processes."""
        process = self._work.accelerator
        per_epoch = self._options.steps_in_epoch(len(self._prompts))
        epoch, place = divmod(update, per_epoch)
        index = batches(len(self._prompts), self._options.batch_size, self._work.seed, epoch)[place]
        index = index[: self._options.batch_size][process.process_index :: process.num_processes]
        rows = [self._prompts[i] for i in index]
        generator = torch.Generator(device=process.device)
        generator.manual_seed(seed_at(self._work.seed, update, process.process_index))
        prompts = [row.ids for row in rows]
        with self._work.phase("rollout"):
            replies = self._engine.generate(prompts, self._sampling, generator)
        lengths = [len(prompt) + len(reply.ids) for prompt, reply in zip(prompts, replies, strict=True)]
        passes = in_order(lengths, self._options.micro_batch_size, self._options.micro_tokens)
        with self._work.phase("score"):
            experience = collect(self._roles, prompts, replies, rule, passes, self._sum)
        for made, row in zip(experience.rows, rows, strict=True):
            made.id = row.id
        self._latest = list(zip(rows, replies, strict=True))[:_SAMPLES]
        return Experience(experience.rows, self._averaged(experience.stats))

    def keep_samples(self, update: int) -> None:
        """Replace samples.jsonl by some of this update's prompts and replies."""
        rows = []
        for row, reply in self._latest:
            text = self._work.renderer.decode(reply.ids)
            rows.append(
                {"prompt": row.text, "id": row.id, "update": update + 1, "reply": text, "ended": reply.finished}
            )
        write_samples(self._work, rows)

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        process = self._work.accelerator
        if process.num_processes == 1:
            return value
        moved = value.to(process.device)
        return process.reduce(moved, "sum").to(value.device)  # type: ignore[no-any-return]

    def _averaged(self, stats: dict[str, float]) -> dict[str, float]:
        """Means over processes, which hold equal shares but for a row."""
        count = self._work.accelerator.num_processes
        if count == 1:
            return stats
        totals = self._sum(torch.tensor(list(stats.values()), dtype=torch.float64))
        return {name: float(total) / count for name, total in zip(stats, totals, strict=True)}


def measured_norm(
    context: StageContext, prompts: Sequence[PromptTokens], roles: PPORoles, options: PPOOptions
) -> dict[str, float]:
    """Score statistics of the starting policy's replies: for a reward model moved to another precision."""
    engine = RolloutEngine(roles.policy, context.renderer.end_token_id, context.renderer.pad_token_id)
    generator = torch.Generator(device=context.accelerator.device)
    generator.manual_seed(context.seed)
    replies = engine.generate(
        [row.ids for row in prompts], Sampling(options.max_new_tokens, options.temperature), generator
    )
    pairs = [(row.ids, reply.ids) for row, reply in zip(prompts, replies, strict=True)]
    scores = torch.tensor(score_replies(roles.reward, pairs, options.micro_batch_size or 64), dtype=torch.float64)
    return {"mean": float(scores.mean()), "std": max(float(scores.std()), 1e-6)}


def adapted_kl_coef(coefficient: float, kl: float, options: PPOOptions) -> float:
    """The next KL coefficient: proportional control of the measured KL towards `kl_target`.

    "Fine-Tuning Language Models from Human Preferences", arXiv 1909.08593, section 2.2; the error is clipped to +-0.2.
    """
    error = max(-0.2, min(0.2, kl / options.kl_target - 1.0))
    return coefficient * (1.0 + error * options.batch_size / options.kl_horizon)
