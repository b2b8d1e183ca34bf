"""PPO: move the policy towards replies the reward model scores higher, without leaving its parent.

"Proximal Policy Optimization Algorithms", arXiv 1707.06347, in the form of "The N+ Implementation Details of RLHF
with PPO", arXiv 2403.17031; `docs/ppo.md` lists the 32 details with our defaults. Differs from common implementations
in that policy, reference, reward and value are adapters on one base held once in memory, and in that its invariants
are checked at step 0 of every run. Costs per update: one rollout, four scoring passes, and `ppo_epochs` passes of
training two roles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from align.rl.options import PPOOptions
from align.stages.base import TrainingStage, stage
from data_prep.core.errors import TrainingStopped, UserError

if TYPE_CHECKING:
    from align.adapters.base import Adapter
    from align.checkpoints.checkpoint import Checkpoint
    from align.checkpoints.compatibility import Standing
    from align.rl.experience import Cast, Experience, RewardRule
    from align.training.context import Work
    from align.training.optimizer import Updater
    from data_prep.prepare.prepare import Prepared
    from data_prep.types import PromptTokens


@stage("ppo")
@dataclass
class PPO(PPOOptions, TrainingStage):
    """Reinforcement learning against the reward model, held near the parent."""

    needs_data: ClassVar[tuple[str, ...]] = ("prompts",)
    needs_reward: ClassVar[bool] = True
    makes: ClassVar[str | None] = "policy"
    base_lr: ClassVar[float] = 2e-5
    trains_head: ClassVar[bool] = True

    def run(self, work: Work) -> Checkpoint:
        """Stand four roles on one base, improve the policy, and save policy and critic."""
        from align.rl import invariants as ppo_checks
        from align.stages.supervised import record_counts

        with work.phase("data"):
            prepared = work.rows("prompts")
        work.write_card(prepared)
        cast = self._assemble(work)
        record_counts(work, cast.policy)
        before = ppo_checks.adapter_digests(cast)
        rule = self._rule(cast, self._norm(work, prepared, cast))
        updater = self._updater(work, cast)
        step0: dict[str, Any] = {"reward_parity": ppo_checks.reward_parity(cast, work)}
        last = self._improve(work, prepared, cast, rule, updater, step0)
        ppo_checks.require_unchanged(cast, before)
        work.numbers["metrics"] = {
            **last,
            "step0": step0,
            "memory": ppo_checks.memory(cast, work.bases, updater),
            "reference_unchanged": True,
        }
        return self._save(work, prepared, cast)

    def refusals(self, where: str, adapter: Adapter, reward: Standing | None) -> Iterator[UserError]:
        """Settings that cannot work; the value role is trained with the reward model's method."""
        from align.checkpoints.compatibility import adapter_of
        from align.rl.options import refusals

        yield from super().refusals(where, adapter, reward)
        if reward is not None:
            yield from self.against_method(where, adapter_of(reward))
        yield from refusals(self, where)

    def doubts(self, where: str, adapter: Adapter, lr_scale: float) -> Iterator[UserError]:
        """Settings that are hardly meant."""
        from align.rl.options import doubts

        yield from super().doubts(where, adapter, lr_scale)
        yield from doubts(self, where)

    def check_rows(self, where: str, count: int) -> None:
        """Every update takes a whole batch of prompts."""
        if count < self.batch_size:
            raise UserError(
                f"{count} training prompts are fewer than one batch of {self.batch_size}",
                code="too_few_rows",
                hint=f"set {where}.batch_size={max(1, count)} or give more prompts",
            )

    def steps_over(self, rows: int) -> int:
        """Optimiser steps: every update's passes over its minibatches."""
        return self.updates * self.ppo_epochs * self.minibatches

    def plan_over(self, rows: int) -> dict[str, float]:
        """Updates, the prompts of each, and the optimiser steps they make."""
        return {
            "updates": self.updates,
            "rows_per_update": self.batch_size,
            "steps": self.steps_over(rows),
            "rows_per_step": self.batch_size // self.minibatches,
        }

    def _assemble(self, work: Work) -> Cast:
        """Policy and reference from the parent, reward from the reward model, value as a trainable copy of it."""
        from align.rl.experience import Cast

        assert work.reward is not None
        load = work.footing.load
        policy = work.fresh_role("policy")
        reference = work.start_role("reference")
        reward = work.bases.realise(work.reward, "reward", load)
        value = work.bases.realise(work.reward, "value", load, trainable=True)
        cast = Cast(policy, reference, reward, value)
        for role in cast.all():
            role.silence_dropout()
        return cast

    def _norm(self, work: Work, prepared: Prepared[PromptTokens], cast: Cast) -> dict[str, float]:
        """Mean and deviation of the scores: the reward model's own, or measured anew at another precision."""
        assert work.reward is not None
        if work.reward.load == work.footing.load.value:
            return dict(work.reward.record["reward_norm"])
        from align.rl.ppo import measured_norm

        return measured_norm(work, prepared.train[: self.batch_size], cast, self)

    def _rule(self, cast: Cast, norm: dict[str, float]) -> RewardRule:
        """How scores become rewards; the value head starts in the same units."""
        import torch

        from align.rl.experience import RewardRule

        assert cast.value.head is not None
        with torch.no_grad():
            cast.value.head.score.weight /= norm["std"]
            cast.value.head.score.bias.sub_(norm["mean"]).div_(norm["std"])
        return RewardRule(
            kl_coef=self.kl_coef,
            mean=norm["mean"],
            std=norm["std"],
            clip=self.reward_clip,
            missing_eos_penalty=self.missing_eos_penalty,
            gamma=self.gamma,
            lam=self.lam,
            temperature=self.temperature,
        )

    def _updater(self, work: Work, cast: Cast) -> Updater:
        from align.rl.actor_critic import ActorCritic
        from align.stages.supervised import groups_of, hooks_of, ready_to_train
        from align.training.optimizer import Updater
        from align.training.regularisers import regularise

        objective = ActorCritic(cast.policy, cast.value, self.clip, self.value_clip, self.value_coef)
        objective.temperature, objective.dual_clip = self.temperature, self.dual_clip
        assert cast.value.adapter is not None
        value_lr = self.peak_lr(cast.value.adapter, work.config.model.lr_scale) * self.value_lr_ratio
        regularise(objective, cast.policy, self, lambda: cast.reference)
        groups = groups_of(cast.policy, work.lr, self) + groups_of(cast.value, value_lr, self)
        for role in (cast.policy, cast.value):
            ready_to_train(role, self)
        steps = self.steps_over(0)
        return Updater(objective, groups, self, steps, work.accelerator, hooks_of(cast.policy) + hooks_of(cast.value))

    def _improve(
        self,
        work: Work,
        prepared: Prepared[PromptTokens],
        cast: Cast,
        rule: RewardRule,
        updater: Updater,
        step0: dict[str, Any],
    ) -> dict[str, float]:
        """All updates: rollout, experience, passes over it. Returns the last update's statistics."""
        from dataclasses import replace

        from align.rl import invariants as ppo_checks
        from align.rl.ppo import Rollouts, adapted_kl_coef
        from align.tracking.progress import Progress

        rollouts = Rollouts(work, prepared.train, cast, self)
        done = work.keeper.step
        kept = work.keeper.restore(updater)
        stats: dict[str, float] = kept.get("stats", {})
        rule = replace(rule, kl_coef=kept.get("kl_coef", rule.kl_coef))
        step0 |= kept.get("step0", {})
        with Progress("ppo", self.updates, enabled=work.is_main, done=done) as progress:
            for update in range(done, self.updates):
                experience = rollouts.collect(update, rule)
                if update == 0:
                    ppo_checks.require_equal_start(experience.stats, step0, ppo_checks.is_exact(work))
                with work.phase("train"):
                    numbers = self._passes(work, updater, experience, update, step0)
                stats = {**experience.stats, **numbers}
                if work.is_main:
                    work.metrics.log(update + 1, "train", stats)
                    rollouts.keep_samples(update)
                progress.advance(
                    1,
                    reward=stats["objective/score_shaped"],
                    kl=stats["objective/kl_k1"],
                    eos=stats["response/eos_rate"],
                )
                if stats["objective/kl_k1"] > self.kl_limit:
                    stats["stopped_on_kl"] = 1.0
                    break
                if self.kl_target > 0:
                    rule = replace(rule, kl_coef=adapted_kl_coef(rule.kl_coef, stats["objective/kl_k1"], self))
                more = {"stats": stats, "kl_coef": rule.kl_coef, "step0": step0}
                work.keeper.offer(updater, update + 1, more)
        return stats

    def _passes(
        self, work: Work, updater: Updater, experience: Experience, update: int, step0: dict[str, Any]
    ) -> dict[str, float]:
        """The update's passes over its experience, ended early when the policy has moved far enough."""
        import numpy as np

        from align.rl import invariants as ppo_checks
        from align.rl.actor_critic import ActorCritic
        from align.training.batching import cut
        from data_prep.prepare.arrow_rows import lengths_of

        objective = updater.objective
        assert isinstance(objective, ActorCritic)
        warming = update < self.critic_warmup
        objective.policy_weight = 0.0 if warming else 1.0
        updater.hold("policy", warming)
        objective.train()
        rows, lengths = experience.rows, lengths_of(experience.rows)
        numbers: dict[str, float] = {}
        for number in range(self.ppo_epochs):
            order = np.random.default_rng([work.seed, update, number, work.accelerator.process_index]).permutation(
                len(rows)
            )
            for part in np.array_split(order, min(self.minibatches, len(rows))):
                passes = cut(lengths[part], self)
                numbers = updater.step([objective.collate([rows[i] for i in part[one]]) for one in passes])
                if update == 0 and number == 0 and "ratio_dev" not in step0:
                    ppo_checks.record_first_minibatch(numbers, objective, work, step0)
                if numbers["policy/ratio_mean"] > self.max_ratio:
                    raise TrainingStopped(
                        f"mean ratio {numbers['policy/ratio_mean']:.1f} at update {update + 1} passes max_ratio",
                        code="ratio",
                        hint="lower stages.ppo.lr or ppo_epochs",
                    )
            if numbers["policy/approxkl"] > self.max_approx_kl:
                break
        return {name: value for name, value in numbers.items() if name != "max_ratio_dev"}

    def _save(self, work: Work, prepared: Prepared[PromptTokens], cast: Cast) -> Checkpoint:
        from align.training.saving import Result, save_result

        assert work.reward is not None
        probe = [row.ids[:64] for row in (prepared.eval or prepared.train)[:2]]
        below = [("init", work.init)] if work.init is not None else []
        critic = Result(cast.value, "value", [("init", work.reward)], probe, {}, "continue")
        save_result(work, critic, work.staging / "value")
        policy = Result(
            role=cast.policy,
            kind="policy",
            parents=[*below, ("reward", work.reward)],
            probe_ids=probe,
            metrics=work.numbers["metrics"],
            on_parent=work.footing.mode.name if work.footing.mode else None,
        )
        return save_result(work, policy, work.staging)
