"""The rollout of a PPO update: which prompts, and the sampled replies to each.

y ~ pi_old( . | x) at the sampling temperature: "Proximal Policy Optimization Algorithms", arXiv 1707.06347, algorithm
1, line 3. Symbols are those of `align/rl/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from align.config.schema import OnParent
from align.inference.generation import Reply, RolloutEngine, Sampling, seeds_of
from align.inference.scoring import score_replies
from align.rl.experience import PPORoles, Rollout
from align.rl.served_rollouts import ServedEngine
from align.training.batching import batches, seed_at
from align.training.context import said_features, write_samples
from align.training.processes import as_one, gathered
from data_prep.core.errors import UserError

if TYPE_CHECKING:
    from concurrent.futures import Future

    from align.rl.actor_critic import ExperienceRow
    from align.rl.options import PPOOptions
    from align.training.context import StageContext
    from data_prep.types import PromptTokens


_SAMPLES = 16  # replies of an update that are kept to be read


class Rollouts:
    """Draws each update's prompts (a function of seed and update alone) and samples a group of replies to each."""

    def __init__(
        self, context: StageContext, prompts: Sequence[PromptTokens], roles: PPORoles, options: PPOOptions
    ) -> None:
        self._context = context
        self._prompts = prompts
        self.options = options
        self._engine = RolloutEngine(roles.policy, context.renderer.end_token_id)
        self._sampling = Sampling(options.max_new_tokens, options.temperature)
        self._served = _servers(context, options) if options.rollout.is_served else None
        self._coming: Future[list[Reply]] | None = None
        """Replies of the next update, which servers are asked for while one trains."""
        self._handed: dict[str, Any] = {}
        """What servers sample those from, in the process that keeps states."""
        count = context.accelerator.num_processes
        if options.prompts_per_update < count:
            least = count * options.replies_per_prompt
            where = f"stages.{context.spec.name}.batch_size"
            raise UserError(
                f"{options.prompts_per_update} prompts of an update cannot be spread over {count} processes",
                code="too_few_rows",
                field=where,
                hint=f"set {where}={least} or more, or launch fewer processes",
            )

    def sample(self, update: int) -> Rollout:
        """This process's share of an update's prompts, each as often as it has replies, and the policy's replies."""
        prompts, seeds = self._drawn(update)
        if self._served is not None:
            return Rollout(prompts, self._from_servers(update))
        with self._context.answering(self._engine.role), self._context.autocast():
            return Rollout(prompts, self._engine.generate([row.ids for row in prompts], self._sampling, seeds))

    def _drawn(self, update: int) -> tuple[list[PromptTokens], list[int]]:
        """The prompts, and the seed that each reply is drawn with."""
        process, seed = self._context.accelerator, self._context.seed
        each, group = self.options.prompts_per_update, self.options.replies_per_prompt
        epoch, place = divmod(update, max(1, len(self._prompts) // each))
        index = batches(len(self._prompts), each, seed, epoch)[place]
        index = index[:each][process.process_index :: process.num_processes]
        prompts = [self._prompts[i] for i in index for _ in range(group)]
        generator = torch.Generator(device=process.device)
        generator.manual_seed(seed_at(seed, update, process.process_index))
        return prompts, seeds_of(len(prompts), generator)

    def _from_servers(self, update: int) -> list[Reply]:
        """The replies of servers; where those are ahead, they go on with the next ones and the policy of now."""
        if self._coming is None:
            self._ask(update)
        assert self._coming is not None
        with as_one(self._context.accelerator):  # no server still samples as the policy is swapped
            replies = self._coming.result()
        self._coming = None
        if self.options.rollout_ahead and update + 1 < self.options.updates:
            self._ask(update + 1)
        return replies

    def _ask(self, update: int, handed: dict[str, Any] | None = None) -> None:
        """Hand servers the policy of now, or one that they had, and begin to ask for an update's replies."""
        served = self._served
        assert served is not None
        with as_one(self._context.accelerator):
            if self._context.is_main:
                if handed is None:
                    served.renew(self._engine.role)
                else:
                    served.hand_over(handed)
                self._handed = served.handed() if self.options.rollout_ahead else {}
        prompts, seeds = self._drawn(update)
        ids = [row.ids for row in prompts]
        self._coming = served.begin(ids, self._sampling, seeds, update)

    def state(self) -> dict[str, Any]:
        """What the replies that are on their way are sampled from: the same command asks for them again."""
        return {"handed": self._handed} if self._coming is not None else {}

    def restore(self, handed: dict[str, Any] | None, update: int) -> None:
        """Ask again for the replies of an update that were on their way, if there were some."""
        if handed is not None:
            self._ask(update, handed)

    def close(self) -> None:
        """No more replies are sampled."""
        if self._served is not None:
            self._served.close(self._context.is_main)

    def summed(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        process = self._context.accelerator
        if process.num_processes == 1:
            return value
        moved = value.to(process.device)
        return process.reduce(moved, "sum").to(value.device)  # type: ignore[no-any-return]

    def joined(self, own: Sequence[ExperienceRow]) -> list[ExperienceRow]:
        """The experience of all processes, in the order in which the update drew its prompts."""
        turns = zip_longest(*gathered(self._context.accelerator, list(own)))
        return [row for turn in turns for row in turn if row is not None]

    def averaged(self, stats: dict[str, float]) -> dict[str, float]:
        """Means over all processes, which hold equal shares but for a row."""
        count = self._context.accelerator.num_processes
        if count == 1:
            return stats
        totals = self.summed(torch.tensor(list(stats.values()), dtype=torch.float64))
        return {name: float(total) / count for name, total in zip(stats, totals, strict=True)}

    def keep(self, rollout: Rollout, update: int) -> None:
        """Replace samples.jsonl by some of this update's prompts and replies."""
        rows = []
        for row, reply in list(zip(rollout.prompts, rollout.replies, strict=True))[:_SAMPLES]:
            text = self._context.renderer.decode(reply.ids)
            about = {**row.shown(), **said_features(row.ids), "update": update + 1}
            rows.append({**about, "reply": text, "ended": reply.finished})
        write_samples(self._context, rows)


def _servers(context: StageContext, options: PPOOptions) -> ServedEngine:
    """What asks the servers for the policy's replies.

    Raises:
        UserError: the policy is more than its adapter on the base.
    """
    if _stands_on_more(context):
        raise UserError(
            "vLLM has the base alone, and the policy stands on its parent's adapter, too",
            field=f"stages.{context.spec.name}.rollout",
            code="illegal_method",
            hint="train the parent's adapter on (on_parent=continue, same method), or leave rollout out",
        )
    process = context.accelerator
    share = (process.process_index, process.num_processes)
    name = f"align-{context.inputs_digest[:12]}"
    return ServedEngine(options, name, context.staging / "served", context.renderer.end_token_id, share)


def _stands_on_more(context: StageContext) -> bool:
    """Whether something lies between the base and the policy's adapter that no server has."""
    parent, mode = context.init, context.parent_mode
    if parent is None or mode.mode is OnParent.merge:
        return parent is not None
    below = context.bases.terms if mode.mode is OnParent.stack else context.bases.terms_under
    return bool(below(parent, mode.load))


def longest_replies(prompts: Sequence[PromptTokens], options: PPOOptions, seed: int) -> list[ExperienceRow]:
    """The update with most prompt tokens among those of the first epoch, as if every reply had its full length.

    Replies to one prompt stand together, unless there are several minibatches: then they may be in several, where none
    shares the prompt.
    """
    from align.rl.actor_critic import ExperienceRow

    every = batches(len(prompts), options.prompts_per_update, seed, 0)[: options.updates]
    index = max(every, key=lambda one: sum(len(prompts[i].ids) for i in one))[: options.prompts_per_update]
    full, group = [0.0] * options.max_new_tokens, options.replies_per_prompt
    places = np.tile(index, group) if options.minibatches > 1 else np.repeat(index, group)
    return [
        ExperienceRow(prompts[i].ids, [0] * len(full), full, full, full, full, prompts[i].id) for i in places.tolist()
    ]


def first_replies(
    context: StageContext, prompts: Sequence[PromptTokens], roles: PPORoles, options: PPOOptions
) -> tuple[Rollout, Tensor]:
    """The starting policy's replies, to measure scores by, and what K reward models say of them, [B, K]."""
    engine = RolloutEngine(roles.policy, context.renderer.end_token_id)
    generator = torch.Generator(device=context.accelerator.device)
    generator.manual_seed(context.seed)
    sampling = Sampling(options.max_new_tokens, options.temperature)
    with context.answering(roles.policy), context.autocast():
        replies = engine.generate([row.ids for row in prompts], sampling, generator)
    rollout = Rollout(prompts, replies)
    with context.autocast():
        found = [score_replies(role, rollout.pairs, options.micro_batch_size or 64) for role in roles.judges()]
    return rollout, torch.tensor(found, dtype=torch.float64).reshape(-1, len(replies)).T


def measured_norms(scores_BK: Tensor) -> list[dict[str, float]]:
    """Score statistics of the starting policy's replies: for reward models moved to another precision."""
    return [{"mean": float(one.mean()), "std": max(float(one.std()), 1e-6)} for one in scores_BK.T]
