"""PPO: move the policy towards replies that a reward model or rules score higher, without leaving its parent.

"Proximal Policy Optimization Algorithms", arXiv 1707.06347, in the form of "The N+ Implementation Details of RLHF
with PPO", arXiv 2403.17031; `docs/ppo.md` lists the 32 details with our defaults. Differs from common implementations
in that policy, reference, reward and value are adapters on one base held once in memory, and in that its invariants
are checked at step 0 of every run. Costs per update: one rollout, four scoring passes, and `ppo_epochs` passes of
training two roles.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from align.rl.options import Critic, Estimator, Monitor, PPOOptions
from align.stages.base import Stage, TrainingStage, stage
from data_prep.core.errors import UserError
from data_prep.core.options import option

if TYPE_CHECKING:
    from align.adapters.base import Adapter
    from align.checkpoints.checkpoint import Checkpoint
    from align.checkpoints.compatibility import ParentInfo
    from align.config.growth import Chain
    from align.rl.actor_critic import ActorCritic, ExperienceRow
    from align.rl.experience import PPORoles, RewardRule
    from align.rl.held_out import HeldOut
    from align.rl.signals.base import Signal
    from align.rl.signals.weighed import Signals
    from align.roles import Role
    from align.training.context import StageContext
    from align.training.optimizer import Updater
    from align.training.rehearsal import Rehearsal
    from data_prep.options import DataOptions
    from data_prep.prepare.prepare import Prepared
    from data_prep.types import PromptTokens, Tokens


@stage("ppo")
@dataclass
class PPO(PPOOptions, TrainingStage):
    """Reinforcement learning against a reward model or rules, held near the parent."""

    needs_data: ClassVar[tuple[str, ...]] = ("prompts",)
    needs_reward: ClassVar[bool] = True
    makes: ClassVar[str | None] = "policy"
    base_lr: ClassVar[float] = 6e-5
    trains_head: ClassVar[bool] = True
    lengthening: ClassVar[tuple[str, ...]] = ("refresh", "reward")

    reward: Any = option(
        None,
        "reward model (default: the run's) or stock classifier, a signal {rule: NAME}, or a list of [{...}, {...}]",
    )

    def __post_init__(self) -> None:
        self.signals()

    @classmethod
    def lengthened(cls, name: str, chain: Chain) -> Chain:
        """With the members of an ensemble that is to be trained, and the rounds that `refresh` asks for."""
        from align.stages.refresh import rounds
        from align.stages.reward_model import members

        return rounds(name, members(name, chain))

    def signals(self) -> list[Signal]:
        """The signals that `reward` lists; none where it names a reward model alone.

        Raises:
            UserError: one that cannot be.
        """
        from align.rl.signals.base import signals_of

        return signals_of(self.reward, f"stages.{self.name}.reward")

    @property
    def reward_model(self) -> str | None:
        """The checkpoint among its rewards."""
        signals = self.signals()
        if not signals:
            return super().reward_model
        return next((name for each in signals for name in each.source.models), "base")

    @property
    def ensemble(self) -> list[str]:
        """The checkpoints among its rewards behind the first."""
        return [name for each in self.signals() for name in each.source.models][1:]

    @property
    def requires_reward_model(self) -> bool:
        """Not where other signals alone give rewards."""
        signals = self.signals()
        return not signals or any(each.source.models for each in signals)

    def run(self, context: StageContext) -> Checkpoint:
        """Stand the roles on one base, improve the policy, and save policy and critic."""
        from align.rl import invariants as ppo_checks
        from align.rl.ppo import improve
        from align.rl.pretraining import Pretraining
        from align.rl.reward_gate import heed
        from align.stages.supervised import record_counts

        heed(context)
        with context.phase("data"):
            prepared, beside = self.rows(context), self._beside(context)
        if beside is not None:
            prepared = replace(prepared, card={**prepared.card, "pretraining": beside.card})
        context.write_card(prepared)
        roles = self._assemble(context)
        record_counts(context, roles.policy)
        before = ppo_checks.adapter_digests(roles)
        rule = self._rule(context, prepared, roles)
        updater = self._updater(context, roles)
        held_out = self._held_out(context, prepared, roles)
        pretraining = Pretraining(beside.train, context.seed) if beside is not None else None
        with context.trunk_shared(roles.policy, roles.all()[1:], again=self.ppo_epochs > 1, together=True):
            last = improve(context, prepared.train, roles, rule, updater, held_out, pretraining)
        ppo_checks.require_unchanged(roles, before)
        context.numbers["metrics"] = {
            **last,
            "memory": ppo_checks.memory(roles, context.bases, updater),
            "reference_unchanged": True,
        }
        return self._save(context, prepared, roles)

    def refusals(self, where: str, adapter: Adapter, reward: ParentInfo | None) -> Iterator[UserError]:
        """Settings that cannot work; the value role is trained with the reward model's method."""
        from align.adapters.base import Adapter
        from align.checkpoints.compatibility import adapter_of
        from align.rl.options import refusals
        from align.rl.served_rollouts import method_refusal

        yield from super().refusals(where, adapter, reward)
        if self.rollout.is_served:
            yield from method_refusal(adapter, where)
        if reward is not None:
            yield from self.against_method(where, adapter_of(reward))
        yield from refusals(self, where)
        if self.ema_decay and type(adapter).after_step is not Adapter.after_step:
            yield UserError(
                f"{getattr(adapter, 'method', type(adapter).__name__)} moves weights beside those that are averaged",
                field=f"{where}.ema_decay",
                code="illegal_method",
                hint="leave it out, or take adapter=lora",
            )
        if self.critic is Critic.parent and not self.requires_reward_model:
            yield UserError(
                "a saved critic belongs to a reward model, and rules alone give the rewards",
                field=f"{where}.critic",
                code="no_critic",
                hint="leave it out: the critic starts anew and warms up",
            )

    @property
    def leaves_critic(self) -> bool:
        """Where advantages are those of a critic."""
        return self.advantage.has_critic

    def parent_refusals(self, where: str, parent: ParentInfo | None) -> Iterator[UserError]:
        """A parent without the critic that this stage is to start from."""
        from align.checkpoints.checkpoint import RECORD, Checkpoint

        if self.critic is Critic.parent and self.advantage.has_critic:
            saved = isinstance(parent, Checkpoint) and (parent.folder / "value" / RECORD).is_file()
            if not saved and not getattr(parent, "critic", False):
                yield _no_critic(f"{where}.critic")

    def doubts(self, where: str, adapter: Adapter, lr_scale: float) -> Iterator[UserError]:
        """Settings that are hardly meant."""
        from align.rl.options import doubts

        yield from super().doubts(where, adapter, lr_scale)
        yield from doubts(self, where)

    @property
    def reads(self) -> tuple[str, ...]:
        """Prompts, and conversations where their loss is mixed in."""
        return (*self.needs_data, *(("conversations",) if self.ptx_coef else ()))

    def check_rows(self, where: str, kind: str, count: int) -> None:
        """Every update takes a whole batch of prompts."""
        if kind == "prompts" and count < self.prompts_per_update:
            raise UserError(
                f"{count} training prompts are fewer than one batch of {self.prompts_per_update}",
                code="too_few_rows",
                hint=f"set {where}.batch_size={max(1, count) * self.replies_per_prompt} or give more prompts",
            )

    def data_refusals(self, data: DataOptions) -> Iterator[UserError]:
        """A server or signal that does not answer, or no gold although replies are to be measured by it."""
        from align.rl.gold import gold_refusals
        from align.rl.served_rollouts import server_refusals

        if self.rollout.is_served:
            yield from server_refusals(self.rollout_url, f"stages.{self.name}", self.rollout_timeout)
        for each in self.signals():
            try:
                each.source.check(each.where, data)
            except UserError as problem:
                yield problem
        if self.monitor is Monitor.gold and not data.gold.has_judge:
            yield UserError(
                "the data has no gold rule to measure held-out replies by",
                field=f"stages.{self.name}.monitor",
                code="no_gold",
                hint="set data.gold.rule, or leave monitor out",
            )
        elif self.monitor in (Monitor.auto, Monitor.gold):
            yield from gold_refusals(data)

    def judged_by(self, data: DataOptions) -> list[Signal]:
        """Its rewards, and the gold judge where held-out replies are measured by it."""
        from align.rl.gold import gold_signal

        gold = gold_signal(data) if self.monitor in (Monitor.auto, Monitor.gold) else None
        return [*self.signals(), *([gold] if gold is not None else [])]

    def check_contents(self, kind: str, rows: Iterable[Any], data: DataOptions) -> None:
        """Rows have what signals and the gold judge need of them: right answers, where rules compare with those."""
        from reward.rules import require_truth

        if kind == "prompts":
            require_truth([each.source.rule_name for each in self.judged_by(data)], rows)

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

    def work(self, rows: int, tokens: float) -> float:
        """Tokens of all updates, as often as they are sampled, read and trained on; a conversation is like a reply."""
        trained = self.ppo_epochs * (2 if self.ptx_coef else 1)
        return self.updates * self.batch_size * (tokens + self.max_new_tokens) * (1 + trained)

    def lighter(self, where: str) -> Iterator[tuple[str, Stage]]:
        """Smaller passes, activations computed again, no critic, fewer replies at a time."""
        yield from super().lighter(where)
        if self.advantage.has_critic:
            yield f"{where}.advantage=reinforce_pp", replace(self, advantage=Estimator.reinforce_pp, critic=Critic.zero)
        half = max(1, self.prompts_per_update // 2) * self.replies_per_prompt
        if half < self.batch_size:
            yield f"{where}.batch_size={half}", replace(self, batch_size=half)

    def rehearse(self, context: StageContext) -> Rehearsal:
        """All roles, the update with the longest prompts, and replies of full length."""
        from align.rl.pretraining import Pretraining
        from align.rl.rollouts import longest_replies
        from align.training.batching import cut
        from align.training.optimizer import ready_to_train
        from align.training.rehearsal import Rehearsal
        from data_prep.prepare.arrow_rows import lengths_of

        rows: Sequence[ExperienceRow] = longest_replies(self.rows(context).train, self, context.seed)
        if (beside := self._beside(context)) is not None:
            rows = Pretraining(beside.train, context.seed).longest(rows)
        roles = replace(self, critic=Critic.zero)._assemble(context)
        for role in roles.trained().values():
            ready_to_train(role, self)
        lengths = lengths_of(rows)
        part = len(rows) // self.minibatches
        trained, scored = cut(lengths[:part], self), cut(lengths, self)
        return Rehearsal(
            roles=roles.all(),
            objective=self._objective(roles),
            train=[rows[place] for place in max(trained, key=lambda one: sum(lengths[i] for i in one))],
            passes=len(trained),
            score=[rows[place] for place in max(scored, key=lambda one: sum(lengths[i] for i in one))],
            reread=int(lengths.sum()),
            answered=[len(row.prompt) for row in rows],
            new_tokens=self.max_new_tokens,
        )

    def _objective(self, roles: PPORoles) -> ActorCritic:
        from align.rl.actor_critic import ActorCritic, PPOLoss
        from align.rl.pretraining import MixedActorCritic

        loss = PPOLoss(**{f.name: getattr(self, f.name) for f in fields(PPOLoss)})
        if self.ptx_coef:
            return MixedActorCritic(roles.policy, roles.value, loss, self.ptx_coef)
        return ActorCritic(roles.policy, roles.value, loss)

    def _beside(self, context: StageContext) -> Prepared[Tokens] | None:
        """The conversations whose loss is mixed in."""
        return context.rows("conversations") if self.ptx_coef else None

    def _assemble(self, context: StageContext) -> PPORoles:
        """Policy and reference from the parent, reward from the reward model if there is one, and the critic."""
        from align.rl.experience import PPORoles

        load = context.parent_mode.load
        policy = context.fresh_role("policy")
        reference = context.start_role("reference")
        judges = [
            context.bases.realise(judge, f"reward_{n}" if n else "reward", load)
            for n, judge in enumerate(context.judges)
        ]
        value = self._critic(context) if self.advantage.has_critic else None
        roles = PPORoles(policy, reference, next(iter(judges), None), value, judges[1:])
        for role in roles.all():
            role.silence_dropout()
        return roles

    def _critic(self, context: StageContext) -> Role:
        """A trainable copy of the reward model under a head of zeros, or the critic of the stage that made the parent.

        The reward head was trained at the ends of replies alone: what it says of the tokens before them is worse than
        a constant. Where rules alone give rewards it is a copy of the parent with such a head.
        """
        if context.reward is None:
            return self._critic_of_parent(context)
        saved = self._saved_critic(context) if self.critic is Critic.parent else context.reward
        value = context.bases.realise(saved, "value", context.parent_mode.load, trainable=True)
        assert value.head is not None
        if saved is context.reward:
            value.head.zero()
        return value

    def _critic_of_parent(self, context: StageContext) -> Role:
        from reward.head import ScalarHead

        value = context.fresh_role("value")
        width = value.tree.get_output_embeddings().weight.shape[1]
        value.head = ScalarHead(width).to(context.accelerator.device)
        value.head.zero()
        return value

    def _saved_critic(self, context: StageContext) -> Checkpoint:
        """The critic beside the parent, if it was trained against this reward model at this precision."""
        from align.checkpoints.checkpoint import RECORD, Checkpoint

        assert context.reward is not None
        where = f"stages.{context.spec.name}.critic"
        folder = context.init.folder / "value" if context.init is not None else None
        if folder is None or not (folder / RECORD).is_file():
            raise _no_critic(where)
        saved = Checkpoint.open(folder)
        saved.check_files()
        judge = saved.parent("init")
        if judge is None or judge.digest != context.reward.digest or saved.load != context.parent_mode.load.value:
            raise UserError(
                "the parent's critic was trained against another reward model, or at another precision",
                field=where,
                code="other_reward",
                hint=f"leave {where} out: the critic starts anew and warms up",
            )
        return saved

    def _held_out(self, context: StageContext, prepared: Prepared[PromptTokens], roles: PPORoles) -> HeldOut | None:
        """The last held-out prompts, which an evaluation of the first few does not ask."""
        from align.rl.gold import gold_judge
        from align.rl.held_out import HeldOut

        if self.monitor is Monitor.off:
            return None
        if not prepared.eval:
            context.warn(
                "no_held_out",
                "there are no held-out prompts, so nothing shows whether replies get better or the reward is fooled",
                "set data.prompts.eval_share=0.1, or monitor=off",
            )
            return None
        gold = None if self.monitor is Monitor.reward else gold_judge(context)
        return HeldOut(context, prepared.eval[-self.monitor_prompts :], roles, gold)

    def _rule(self, context: StageContext, prepared: Prepared[PromptTokens], roles: PPORoles) -> RewardRule:
        """How scores become rewards: by the reward model's own mean and deviation, or as the signals are weighed."""
        from align.rl.experience import RewardRule

        signals, norm = self._signals(context, prepared, roles)
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
            signals=signals,
        )

    def _signals(
        self, context: StageContext, prepared: Prepared[PromptTokens], roles: PPORoles
    ) -> tuple[Signals | None, dict[str, float]]:
        """The signals at work, if there are any, and the norm of what the reward is before it is shaped."""
        from align.rl.rollouts import first_replies, measured_norms
        from align.rl.signals.base import Site
        from align.rl.signals.weighed import Signals
        from align.training.processes import as_one, from_main

        listed, still = self.signals(), {"mean": 0.0, "std": 1.0}
        moved = any(judge.load != context.parent_mode.load.value for judge in context.judges)
        first = None
        if moved or any(each.measured for each in listed):
            first = first_replies(context, prepared.train[: self.batch_size], roles, self)
        if moved and first is not None:
            norms = measured_norms(first[1])
        else:
            norms = [dict(judge.record["reward_norm"]) for judge in context.judges]
        if not listed:
            return None, norms[0]
        site = Site(context.spec.data, context.accelerator.device, context.config.allow_code, norms)
        with as_one(context.accelerator):
            signals = Signals(listed, site, context.renderer.decode)
        if first is not None:
            said, models_BK = first
            signals.begin(from_main(context.accelerator, lambda: signals.scores(said.prompts, said.replies, models_BK)))
        return signals, still

    def _updater(self, context: StageContext, roles: PPORoles) -> Updater:
        from align.stages.supervised import groups_of, hooks_of
        from align.training.optimizer import Updater, ready_to_train
        from align.training.regularisers import regularise

        objective = self._objective(roles)
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

        probe = [row.ids[:64] for row in (prepared.eval or prepared.train)[:2]]
        below = [("init", context.init)] if context.init is not None else []
        judges = [("reward", judge) for judge in context.judges]
        on_parent = context.parent_mode.mode.name if context.parent_mode.mode else None
        if roles.value is not None:
            started = ([("init", context.reward)], "continue") if context.reward is not None else (below, on_parent)
            critic = Result(roles.value, "value", started[0], probe, {}, started[1])
            save_result(context, critic, context.staging / "value")
        policy = Result(
            role=roles.policy,
            kind="policy",
            parents=[*below, *judges],
            judges=[judge for each in self.signals() for judge in each.source.judges()],
            probe_ids=probe,
            metrics=context.numbers["metrics"],
            on_parent=on_parent,
        )
        return save_result(context, policy, context.staging)


def _no_critic(where: str) -> UserError:
    return UserError(
        "the parent has no critic beside it",
        field=where,
        code="no_critic",
        hint=f"start from a PPO stage that had one (init=RUN/ppo), or leave {where} out",
    )
