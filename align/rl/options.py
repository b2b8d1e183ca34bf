"""What can be set of PPO, what of it cannot work, and what a knowledgeable person would ask about. No torch.

Of the symbols of `align/rl/__init__.py`, beta is `kl_coef`, gamma `gamma` and lambda `lam`; `eps` is Adam's. The
objective is eq. 9 of arXiv 1707.06347; defaults follow arXiv 2403.17031.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from align.training.options import Schedule, TrainingOptions
from data_prep.core.errors import UserError
from data_prep.core.options import listing, option


class Estimator(Enum):
    """How advantages are estimated (`align/rl/advantages.py`)."""

    gae = "gae"
    rloo = "rloo"
    grpo = "grpo"
    reinforce_pp = "reinforce_pp"

    @property
    def has_critic(self) -> bool:
        """Whether it reads values, so that a value role is trained beside the policy."""
        return self is Estimator.gae

    @property
    def compares(self) -> bool:
        """Whether it compares the replies to one prompt, so that there must be several."""
        return self in (Estimator.rloo, Estimator.grpo)


class Critic(Enum):
    """What the value role starts from."""

    zero = "zero"
    parent = "parent"


class Monitor(Enum):
    """What held-out replies are measured by."""

    auto = "auto"
    gold = "gold"
    reward = "reward"
    off = "off"


class OnAlarm(Enum):
    """What becomes of a stage whose numbers show a fault."""

    warn = "warn"
    stop = "stop"


class Sampler(Enum):
    """Who samples the replies of an update."""

    own = "own"
    vllm = "vllm"

    @property
    def is_served(self) -> bool:
        """Whether servers do."""
        return self is not Sampler.own


GROUP = 4
"""Replies to a prompt where they are compared and no other number is set."""


@dataclass
class PPOOptions(TrainingOptions):
    """What can be set of PPO."""

    schedule: Schedule = option(Schedule.linear, "learning rate after warm-up: constant|linear|cosine (to zero)")
    warmup: float = option(0.0, "share of the steps with rising learning rate", high=1)
    batch_size: int = option(128, "replies per update, over all processes", low=1)
    advantage: Estimator = option(Estimator.gae, "gae|rloo|grpo|reinforce_pp: with a critic, or without one")
    group_size: int | None = option(None, "replies to each prompt (default: 4 with rloo and grpo, else 1)", low=1)
    updates: int = option(55, "rollout-and-update rounds", low=1)
    ppo_epochs: int = option(2, "passes over each round's replies", low=1)
    minibatches: int = option(4, "optimiser steps per pass", low=1)
    eps: float = option(1e-5, "denominator constant of Adam", above=0)
    beta2: float = option(0.95, "second-moment decay of Adam", below=1)
    max_new_tokens: int = option(32, "longest reply in tokens", low=1)
    temperature: float = option(0.7, "sampling temperature, also of the log-probabilities that are trained", above=0)
    kl_coef: float = option(0.08, "weight of the per-token KL penalty (k1) in the reward")
    kl_target: float = option(0.0, "KL per reply that an adaptive kl_coef steers to (0: fixed coefficient)")
    kl_horizon: float = option(10.0, "updates in which the adaptive kl_coef can grow or shrink by a factor e", low=1)
    kl_limit: float = option(
        15.0, "stop the stage once the mean KL per reply, in nats, passes this", above=0, high=math.inf
    )
    gamma: float = option(1.0, "discount", high=1)
    lam: float = option(0.95, "lambda of generalised advantage estimation", high=1)
    lam_length: float = option(0.0, "alpha of a lambda by length in its place, 1 - 1 / (alpha x tokens) (0: off)")
    clip: float = option(0.2, "ratio clip of the policy loss", above=0)
    clip_high: float = option(0.0, "clip of ratios above 1, where it is to be wider (0: clip; usual 0.28)")
    dual_clip: float = option(0.0, "bound of the loss for negative advantages (0: off; usual 3)")
    value_clip: float = option(0.2, "clip of the value's change (0: off)")
    value_coef: float = option(1.0, "weight of the value loss")
    value_lr_ratio: float = option(2.0, "learning rate of the value role over the policy's")
    reward_clip: float = option(10.0, "normalised scores are clipped to this", above=0, high=math.inf)
    missing_eos_penalty: float = option(1.0, "subtracted from the reward of a reply that does not end")
    ptx_coef: float = option(
        0.0, "weight of a pretraining loss on the data's conversations in the policy's (0: off; usual 0.05)"
    )
    ema_decay: float = option(
        0.0,
        "decay of an update in a moving average of the policy's weights, which held-out prompts are answered with and "
        "the stage hands over (0: off; such as 0.9)",
        below=1,
    )
    critic: Critic = option(
        Critic.zero, "zero|parent: what values start from, a head of zeros or the critic saved beside init"
    )
    critic_warmup: int = option(4, "first updates that train the value role alone")
    max_approx_kl: float = option(
        0.1, "end an update's passes once KL(old, new) per token passes this", above=0, high=math.inf
    )
    max_ratio: float = option(10.0, "stop if a minibatch's mean ratio passes this", above=0, high=math.inf)
    monitor: Monitor = option(
        Monitor.auto, "auto|gold|reward|off: what held-out replies are measured by; auto: gold where the data has it"
    )
    monitor_prompts: int = option(64, "held-out prompts that are answered at every look", low=1)
    eval_every: int = option(0, "updates between looks at held-out prompts (0: ten times per run)")
    patience: int = option(3, "stop after so many looks in a row with a higher reward and a lower measure (0: never)")
    on_alarm: OnAlarm = option(OnAlarm.warn, "warn|stop: what to do once the numbers of updates show a fault")
    refresh: int = option(
        0,
        "rounds behind this stage: the reward model goes on with pairs of the policy's replies that a judge calls "
        "worse, and PPO with it (REWARD_MODEL_2, PPO_2, ...)",
        high=20,
    )
    rollout: Sampler = option(Sampler.own, "own|vllm: who samples an update's replies, the stage itself or servers")
    rollout_url: list[str] = listing("addresses of those servers: [http://HOST:PORT, ...]")
    rollout_timeout: float = option(300.0, "seconds to wait for a reply of a server", above=0)
    rollout_gap: float = option(
        0.05, "stop once the log-probabilities that servers sampled with are so far from ours, in the mean", above=0
    )
    rollout_cap: float = option(0.0, "bound of the importance weights of served tokens (0: no weights; usual 2)")
    rollout_ahead: int = option(
        0, "updates that servers are ahead by: 0, or 1 (they sample the next replies while an update trains)", high=1
    )

    @property
    def replies_per_prompt(self) -> int:
        """Size of a group."""
        return self.group_size or (GROUP if self.advantage.compares else 1)

    @property
    def idle(self) -> set[str]:
        """Options that decide nothing of the result, as the others are set."""
        served = {"rollout", "rollout_cap"} if self.rollout is Sampler.own else set()
        served |= set() if self.rollout_ahead else {"rollout_ahead"}
        off = {name for name in ("ptx_coef", "ema_decay") if not getattr(self, name)}
        return served | off | {"rollout_url", "rollout_timeout", "rollout_gap", "refresh"}

    def gap_at(self, update: int) -> float:
        """Largest mean difference, in nats a token, of the log-probabilities that servers sampled with from ours.

        Where an update lies between, its passes go on until KL(old, new), which is half the mean square of what they
        move log-probabilities by, passes `max_approx_kl`.
        """
        return self.rollout_gap + (math.sqrt(2 * self.max_approx_kl) if update and self.rollout_ahead else 0.0)

    @property
    def prompts_per_update(self) -> int:
        """Prompts of an update, over all processes."""
        return self.batch_size // self.replies_per_prompt

    @property
    def warmup_updates(self) -> int:
        """First updates in which the policy rests."""
        return self.critic_warmup if self.advantage.has_critic else 0

    @property
    def steps_per_update(self) -> int:
        """Optimiser steps of an update whose passes do not end early."""
        return self.ppo_epochs * self.minibatches


def refusals(options: PPOOptions, where: str) -> Iterator[UserError]:
    """What cannot work, whatever the data."""
    if options.neftune:
        yield UserError(
            "noise in training forwards would count as a change of the policy since its replies were sampled",
            field=f"{where}.neftune",
            code="bad_value",
            hint="leave it out; it belongs into sft",
        )
    yield from _of_groups(options, where)
    yield from _of_servers(options, where)
    if options.warmup_updates >= options.updates:
        yield UserError(
            f"no update would train the policy: {options.updates} updates, "
            f"{options.critic_warmup} for the critic alone",
            field=f"{where}.critic_warmup",
            code="bad_value",
            hint="raise updates or lower critic_warmup",
        )
    if options.minibatches > options.batch_size:
        yield UserError(
            f"a batch of {options.batch_size} prompts cannot be cut into {options.minibatches} minibatches",
            field=f"{where}.minibatches",
            code="bad_value",
            hint="lower minibatches or raise batch_size",
        )
    if options.kl_target > 0 and options.kl_coef == 0:
        yield UserError(
            "an adaptive coefficient that starts at 0 stays 0",
            field=f"{where}.kl_target",
            code="bad_value",
            hint="set kl_coef above 0, or kl_target=0",
        )


def _of_groups(options: PPOOptions, where: str) -> Iterator[UserError]:
    """Replies that cannot be compared, and what only a critic has a use for."""
    size, name = options.replies_per_prompt, options.advantage.value
    if options.batch_size % size:
        yield UserError(
            f"{options.batch_size} replies cannot be cut into groups of {size}",
            field=f"{where}.group_size",
            code="bad_value",
            hint=f"set {where}.batch_size={max(1, options.batch_size // size) * size} or a group_size that divides it",
        )
    if options.advantage.compares and size == 1:
        yield UserError(
            f"{name} compares the replies to a prompt and needs more than one",
            field=f"{where}.group_size",
            code="bad_value",
            hint=f"leave it out for {GROUP}, or set {where}.advantage=reinforce_pp",
        )
    if options.lam_length and not options.advantage.has_critic:
        yield UserError(f"{name} has no lambda", field=f"{where}.lam_length", code="no_effect", hint="leave it out")
    if options.critic is Critic.parent and not options.advantage.has_critic:
        yield UserError(f"{name} has no critic", field=f"{where}.critic", code="no_effect", hint="leave it out")


def _of_servers(options: PPOOptions, where: str) -> Iterator[UserError]:
    """Servers without an address, or settings of servers where there are none."""
    if options.rollout.is_served and not options.rollout_url:
        yield UserError(
            "no server is named",
            field=f"{where}.rollout_url",
            code="bad_value",
            hint=f"set {where}.rollout_url=[http://HOST:PORT]; docs/scale.md says how to start one",
        )
    for name in ("rollout_url", "rollout_cap", "rollout_ahead"):
        if getattr(options, name) and not options.rollout.is_served:
            yield UserError(
                "the stage samples its replies itself",
                field=f"{where}.{name}",
                code="no_effect",
                hint=f"set {where}.rollout=vllm, or leave {name} out",
            )


def doubts(options: PPOOptions, where: str) -> Iterator[UserError]:
    """What works but is hardly meant. Ranges are those of the runs in arXiv 2403.17031, with room on both sides."""

    def doubt(name: str, problem: str, hint: str) -> UserError:
        value = getattr(options, name)
        return UserError(f"{value:g} {problem}", field=f"{where}.{name}", code="unusual_value", hint=hint)

    if options.kl_coef > 1:
        yield doubt("kl_coef", "makes the KL penalty outweigh the normalised reward", "usual: 0.01 to 0.2")
    if options.kl_coef == 0:
        yield doubt("kl_coef", "lets the policy leave its parent until kl_limit stops the stage", "usual: 0.01 to 0.2")
    if not 0.02 <= options.clip <= 0.5:
        yield doubt("clip", "is an unusual ratio clip", "usual: 0.1 to 0.3")
    if 0 < options.clip_high < options.clip:
        yield doubt("clip_high", f"is narrower than clip ({options.clip:g})", "usual: 0.28, or 0 for clip")
    if 0 < options.dual_clip <= 1:
        yield doubt("dual_clip", "bounds the loss below an unchanged ratio of 1", "usual: 3, or 0 for off")
    if options.gamma < 0.9:
        yield doubt("gamma", "hides the reward, given at a reply's end, from its first tokens", "usual: 1")
    if options.kl_target > 0 and options.kl_horizon > options.updates:
        yield doubt(
            "kl_horizon",
            f"is counted in updates, of which there are {options.updates}: the coefficient would hardly move",
            "usual: 5 to 20",
        )
    if options.rollout_ahead and not options.rollout_cap:
        yield doubt(
            "rollout_ahead",
            "update ahead, replies are an older policy's, and weigh as if they were this one's",
            "set rollout_cap=2",
        )
    moving = options.updates - options.warmup_updates
    if options.ema_decay and 1 / (1 - options.ema_decay) > moving:
        yield doubt(
            "ema_decay",
            f"averages over more updates than the {moving} that train the policy: much of its start would be left",
            "such as 0.9",
        )
    if not 0.3 <= options.temperature <= 2:
        yield doubt("temperature", "samples replies far from what the model says", "usual: 0.7 to 1")
    size, rest = divmod(options.batch_size, options.minibatches)
    if rest and options.minibatches <= options.batch_size:
        yield doubt(
            "minibatches",
            f"minibatches of a batch of {options.batch_size} are of unequal size",
            "take a divisor of batch_size",
        )
    elif options.micro_batch_size and size > options.micro_batch_size and size % options.micro_batch_size:
        yield doubt(
            "micro_batch_size",
            f"rows at a time leave a remainder in every minibatch of {size}",
            f"take a divisor of {size}",
        )
