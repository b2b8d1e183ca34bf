"""PPO: move the policy towards replies the reward model scores higher, without leaving its parent.

"Proximal Policy Optimization Algorithms", arXiv 1707.06347, in the form of "The N+ Implementation Details of RLHF
with PPO", arXiv 2403.17031; `docs/ppo.md` lists the 32 details with our defaults. Differs from common implementations
in that policy, reference, reward and value are adapters on one base held once in memory, and in that its invariants
are checked at step 0 of every run. Costs per update: one rollout, four scoring passes, and `ppo_epochs` passes of
training two roles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from align.rl.options import PPOOptions
from align.stages.base import TrainingStage, stage
from data_prep.core.errors import UserError

if TYPE_CHECKING:
    from align.adapters.base import Adapter
    from align.checkpoints.checkpoint import Checkpoint
    from align.checkpoints.compatibility import ParentInfo
    from align.rl.experience import PPORoles, RewardRule
    from align.training.context import StageContext
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
    base_lr: ClassVar[float] = 6e-5
    trains_head: ClassVar[bool] = True

    def run(self, context: StageContext) -> Checkpoint:
        """Stand four roles on one base, improve the policy, and save policy and critic."""
        from align.rl import invariants as ppo_checks
        from align.rl.ppo import improve
        from align.rl.reward_gate import heed
        from align.stages.supervised import record_counts

        heed(context)
        with context.phase("data"):
            prepared = context.rows("prompts")
        context.write_card(prepared)
        roles = self._assemble(context)
        record_counts(context, roles.policy)
        before = ppo_checks.adapter_digests(roles)
        rule = self._rule(self._norm(context, prepared, roles))
        updater = self._updater(context, roles)
        step0: dict[str, Any] = {"reward_parity": ppo_checks.reward_parity(roles, context)}
        last = improve(context, prepared.train, roles, rule, updater, step0)
        ppo_checks.require_unchanged(roles, before)
        context.numbers["metrics"] = {
            **last,
            "step0": step0,
            "memory": ppo_checks.memory(roles, context.bases, updater),
            "reference_unchanged": True,
        }
        return self._save(context, prepared, roles)

    def refusals(self, where: str, adapter: Adapter, reward: ParentInfo | None) -> Iterator[UserError]:
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
        if count < self.prompts_per_update:
            raise UserError(
                f"{count} training prompts are fewer than one batch of {self.prompts_per_update}",
                code="too_few_rows",
                hint=f"set {where}.batch_size={max(1, count) * self.replies_per_prompt} or give more prompts",
            )

    def steps_over(self, rows: int) -> int:
        """Optimiser steps: every update's passes over its minibatches."""
        return self.updates * self.steps_per_update

    def plan_over(self, rows: int) -> dict[str, float]:
        """Updates, the prompts of each, and the optimiser steps they make."""
        return {
            "updates": self.updates,
            "rows_per_update": self.prompts_per_update,
            "steps": self.steps_over(rows),
            "rows_per_step": self.batch_size // self.minibatches,
        }

    def _assemble(self, context: StageContext) -> PPORoles:
        """Policy and reference from the parent, reward from the reward model, value as a trainable copy of it.

        The value head starts at zero: the reward head was trained at the ends of replies alone, and what it says of
        the tokens before them is worse than a constant.
        """
        from align.rl.experience import PPORoles

        assert context.reward is not None
        load = context.parent_mode.load
        policy = context.fresh_role("policy")
        reference = context.start_role("reference")
        reward = context.bases.realise(context.reward, "reward", load)
        value = None
        if self.advantage.has_critic:
            value = context.bases.realise(context.reward, "value", load, trainable=True)
            assert value.head is not None
            value.head.zero()
        roles = PPORoles(policy, reference, reward, value)
        for role in roles.all():
            role.silence_dropout()
        return roles

    def _norm(self, context: StageContext, prepared: Prepared[PromptTokens], roles: PPORoles) -> dict[str, float]:
        """Mean and deviation of the scores: the reward model's own, or measured anew at another precision."""
        assert context.reward is not None
        if context.reward.load == context.parent_mode.load.value:
            return dict(context.reward.record["reward_norm"])
        from align.rl.rollouts import measured_norm

        return measured_norm(context, prepared.train[: self.batch_size], roles, self)

    def _rule(self, norm: dict[str, float]) -> RewardRule:
        """How scores become rewards."""
        from align.rl.experience import RewardRule

        return RewardRule(
            kl_coef=self.kl_coef,
            mean=norm["mean"],
            std=norm["std"],
            clip=self.reward_clip,
            missing_eos_penalty=self.missing_eos_penalty,
            gamma=self.gamma,
            lam=self.lam,
            temperature=self.temperature,
            estimator=self.advantage,
            group_size=self.replies_per_prompt,
            lam_length=self.lam_length,
        )

    def _updater(self, context: StageContext, roles: PPORoles) -> Updater:
        from align.rl.actor_critic import ActorCritic, PPOLoss
        from align.stages.supervised import groups_of, hooks_of, ready_to_train
        from align.training.optimizer import Updater
        from align.training.regularisers import regularise

        loss = PPOLoss(**{f.name: getattr(self, f.name) for f in fields(PPOLoss)})
        objective = ActorCritic(roles.policy, roles.value, loss)
        regularise(objective, roles.policy, self, lambda: roles.reference)
        wait = self.warmup_updates * self.steps_per_update
        groups, hooks = groups_of(roles.policy, context.lr, self, wait), hooks_of(roles.policy, wait)
        if roles.value is not None:
            assert roles.value.adapter is not None
            value_lr = self.peak_lr(roles.value.adapter, context.config.model.lr_scale) * self.value_lr_ratio
            groups, hooks = groups + groups_of(roles.value, value_lr, self), hooks + hooks_of(roles.value)
        for role in roles.trained().values():
            ready_to_train(role, self)
        return Updater(objective, groups, self, self.steps_over(0), context.accelerator, hooks)

    def _save(self, context: StageContext, prepared: Prepared[PromptTokens], roles: PPORoles) -> Checkpoint:
        from align.training.saving import Result, save_result

        assert context.reward is not None
        probe = [row.ids[:64] for row in (prepared.eval or prepared.train)[:2]]
        below = [("init", context.init)] if context.init is not None else []
        if roles.value is not None:
            critic = Result(roles.value, "value", [("init", context.reward)], probe, {}, "continue")
            save_result(context, critic, context.staging / "value")
        policy = Result(
            role=roles.policy,
            kind="policy",
            parents=[*below, ("reward", context.reward)],
            probe_ids=probe,
            metrics=context.numbers["metrics"],
            on_parent=context.parent_mode.mode.name if context.parent_mode.mode else None,
        )
        return save_result(context, policy, context.staging)
