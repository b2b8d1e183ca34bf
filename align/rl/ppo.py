"""The update loop of PPO: rollout, rewards, advantages, passes, then log, stop or go on.

"Proximal Policy Optimization Algorithms", arXiv 1707.06347, algorithm 1, with the rewards of "Fine-Tuning Language
Models from Human Preferences", arXiv 1909.08593, eq. 2. The same loop elsewhere: `PPOTrainer.train` of TRL.
`docs/ppo.md` has the details and their defaults; symbols are those of `align/rl/__init__.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from align.models.trunk import forget_rows
from align.rl import invariants
from align.rl.actor_critic import ActorCritic, ExperienceRow
from align.rl.advantages import estimate, weigh
from align.rl.experience import PPORoles, RewardRule, experience, judge, reward, statistics
from align.rl.held_out import HeldOut
from align.rl.options import PPOOptions
from align.rl.pretraining import Pretraining
from align.rl.rollouts import Rollouts
from align.rl.watch import Watch
from align.training.batching import cut, rows_at, shares
from align.training.processes import as_one
from data_prep.core.errors import TrainingStopped
from data_prep.core.progress import Progress
from data_prep.prepare.arrow_rows import lengths_of

if TYPE_CHECKING:
    from align.training.context import StageContext
    from align.training.optimizer import Updater
    from data_prep.types import PromptTokens

SHOWN = {"reward": "objective/score_shaped", "kl": "objective/kl_k1", "eos": "response/eos_rate"}
"""What the progress bar shows."""
OUTSIDE = ("signal_failed", "rollout_failed", "rollout_gap")
"""Codes of stops by what is not of this process: scorers and servers."""
REACH = 100.0
"""An adaptive KL coefficient stays within this factor of where it began."""


def improve(
    context: StageContext,
    prompts: Sequence[PromptTokens],
    roles: PPORoles,
    rule: RewardRule,
    updater: Updater,
    held_out: HeldOut | None,
    pretraining: Pretraining | None = None,
) -> dict[str, Any]:
    """All updates, or those that an earlier run left to do, then the weights of the best one that was looked at.

    With `pretraining`, conversations are trained on beside the replies.
    Returns the last update's statistics, what was found at step 0, and what was kept.
    """
    options = updater.options
    assert isinstance(options, PPOOptions)
    rollouts = Rollouts(context, prompts, roles, options)
    watch = Watch(context, updater, held_out)
    done = context.saver.step
    kept = context.saver.restore(updater)
    stats: dict[str, float] = kept.get("stats", {})
    step0: dict[str, Any] = kept.get("step0") or invariants.reward_parity(roles, context)
    rule = replace(rule, kl_coef=kept.get("kl_coef", rule.kl_coef))
    if done:
        watch.restore(kept["watch"])
        rollouts.restore(kept.get("handed"), done)
        if rule.signals is not None:
            rule.signals.restore(kept["signals"])
    else:
        watch.begin(rule)

    def state(**found: bool) -> dict[str, Any]:
        more = {"stats": stats, "kl_coef": rule.kl_coef, "step0": step0, "watch": watch.state(), **found}
        more |= rollouts.state()
        return more | ({"signals": rule.signals.state()} if rule.signals is not None else {})

    unseen = bool(kept.get("unseen"))  # a scorer failed at the look behind the last update
    with closing(rollouts), Progress("ppo", options.updates, enabled=context.is_main, done=done) as progress:
        for update in range(done - unseen, options.updates):
            if not unseen:
                with saved_if_stopped(context, updater, update, state() if update else None):
                    rows, stats = collect(context, rollouts, roles, rule, update)
                if pretraining is not None:
                    rows = pretraining.beside(rows, update)
                stats |= learn(context, updater, rows, stats, update, step0)
                progress.advance(1, **{short: stats[name] for short, name in SHOWN.items()})
            unseen = False
            with saved_if_stopped(context, updater, update + 1, state(unseen=True)):
                if watch.ends(update, stats, rule):
                    break
            if options.kl_target > 0 and update >= options.warmup_updates:
                rule = replace(rule, kl_coef=adapted_kl_coef(rule.kl_coef, stats["objective/kl_k1"], options))
            context.saver.offer(updater, update + 1, state())
    updater.go_to(updater.steps)
    return {**stats, "step0": step0, **watch.finish()}


def learn(
    context: StageContext,
    updater: Updater,
    rows: Sequence[ExperienceRow],
    stats: dict[str, float],
    update: int,
    step0: dict[str, Any],
) -> dict[str, float]:
    """An update's passes over its experience, logged with what is known of the replies; returns their numbers."""
    if update == 0:
        invariants.require_equal_start(stats, step0, invariants.is_exact(context))
    with context.phase("train"):
        numbers = passes(context, updater, rows, update, step0)
    if context.is_main:
        context.metrics.log(update + 1, "train", stats | numbers)
    return numbers


@contextmanager
def saved_if_stopped(context: StageContext, updater: Updater, done: int, more: dict[str, Any] | None) -> Iterator[None]:
    """Keep the state after the updates so far, if there were any, where a signal fails: nothing has changed since."""
    try:
        yield
    except TrainingStopped as stopped:
        if more and stopped.code in OUTSIDE:
            context.saver.keep(updater, done, more)
        raise


def collect(
    context: StageContext, rollouts: Rollouts, roles: PPORoles, rule: RewardRule, update: int
) -> tuple[list[ExperienceRow], dict[str, float]]:
    """An update's replies as experience, and what is logged of them."""
    forget_rows(roles.policy.tree)  # replies of the last update do not come again
    with context.phase("rollout"):
        rollout = rollouts.sample(update)
    with context.phase("score"):
        options = rollouts.options
        served = options.rollout.is_served
        trusted = update > 0 and invariants.is_exact(context) and not served
        with as_one(context.accelerator):
            judged = judge(roles, rollout, rule.temperature, options, trusted, rule.signals)
        if rule.signals is not None:
            rule.signals.learn(judged.signals, rollouts.summed)
        rewards = reward(judged, rollout, rule)
        advantages = estimate(rewards, judged, rule, rollouts.summed)
        more: dict[str, float] = {}
        if served:
            advantages, more = weigh(advantages, judged, options.rollout_cap)
        rows = rollouts.joined(experience(rollout, judged, advantages))
        stats = rollouts.averaged(statistics(rollout, judged, rewards, advantages, rule) | more)
        invariants.require_near(stats, options, update)
    if context.is_main:
        rollouts.keep(rollout, update)
    return rows, stats


def passes(
    context: StageContext, updater: Updater, rows: Sequence[ExperienceRow], update: int, step0: dict[str, Any]
) -> dict[str, float]:
    """An update's passes over the experience of all processes, ended early when the policy has moved far enough.

    Minibatches are cut from all rows together, so that every process takes the same steps over the same rows; one
    whose share of a minibatch is empty takes part with a row that does not count. Returns the numbers of the last one.
    """
    options, objective = updater.options, updater.objective
    assert isinstance(options, PPOOptions) and isinstance(objective, ActorCritic)
    process = context.accelerator
    updater.go_to(update * options.steps_per_update)
    objective.train()
    lengths = lengths_of(rows)
    numbers: dict[str, float] = {}
    for number in range(options.ppo_epochs):
        drawn = np.random.default_rng([context.seed, update, number, 0])
        for part in np.array_split(drawn.permutation(len(rows)), min(options.minibatches, len(rows))):
            if options.replies_per_prompt > 1:
                part = np.sort(part)  # replies to one prompt stand together: a pass computes it once for them
            own = part
            if process.num_processes > 1:
                own = part[shares(lengths[part], options, process.num_processes)[process.process_index]]
            counted = own if len(own) else part[:1]
            micro = rows_at(rows, [counted[one].tolist() for one in cut(lengths[counted], options)])
            first = "ratio_dev" not in step0  # computes the policy in any case, to be checked
            objective.warming = update < options.warmup_updates and not first
            numbers = updater.step([objective.collate(one) for one in micro], counts=bool(len(own)))
            if first:
                invariants.record_first_minibatch(numbers, context, step0)
            if numbers.get("policy/ratio_mean", 1.0) > options.max_ratio:
                where = f"stages.{context.spec.name}"
                raise TrainingStopped(
                    f"mean ratio {numbers['policy/ratio_mean']:.1f} at update {update + 1} passes max_ratio",
                    code="ratio",
                    hint=f"lower {where}.lr or {where}.ppo_epochs, or set {where}.warmup=0.1",
                )
        if numbers.get("policy/approxkl", 0.0) > options.max_approx_kl:
            break
    return {name: value for name, value in numbers.items() if "ratio_dev" not in name}


def adapted_kl_coef(coefficient: float, kl: float, options: PPOOptions) -> float:
    """The next KL coefficient: proportional control of the measured KL towards `kl_target`.

    After "Fine-Tuning Language Models from Human Preferences", arXiv 1909.08593, section 2.2, but in the logarithm and
    by updates: an error of 100 % or more over `kl_horizon` updates multiplies or divides by e. It never leaves a
    hundredth to a hundred times `kl_coef`, so that a KL that cannot be steered does not wind it up.
    """
    error = max(-1.0, min(1.0, kl / options.kl_target - 1.0))
    moved = coefficient * math.exp(error / options.kl_horizon)
    return max(options.kl_coef / REACH, min(options.kl_coef * REACH, moved))
