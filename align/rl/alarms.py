"""What goes wrong in PPO as its numbers show it: each with its cause and its remedy in a line.

Every alarm reads the numbers that an update logs (`docs/ppo.md`) beside those of the first one, and goes off once in a
stage. Bounds are far from what a healthy run shows; `stages.ppo.on_alarm=stop` ends the stage at the first that does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from align.rl.options import PPOOptions

Numbers = Mapping[str, float]
WINDOW = 3
"""Updates in a row that must show a fault before it is one."""


@dataclass(frozen=True)
class Alarm:
    """A fault that the numbers show."""

    code: str
    message: str
    hint: str


@dataclass
class Alarms:
    """The alarms of a stage; `history` has the numbers of every update so far, and is kept with its state."""

    options: PPOOptions
    where: str
    """`stages.NAME`, for the hints."""
    own_scale: bool = False
    """Whether scores are those of signals, whose scale is what was set, not a reward model's in its own deviations."""
    history: list[dict[str, float]] = field(default_factory=list)
    raised: list[str] = field(default_factory=list)
    """Codes of those that went off."""

    def take(self, numbers: Numbers) -> list[Alarm]:
        """Take an update's numbers in; the alarms that go off with it."""
        self.history.append({name: numbers[name] for name in READ if name in numbers})
        warmup = self.options.warmup_updates
        moving = self.history[warmup:]
        found = [alarm for check in CHECKS for alarm in check(self.history, moving, self)]
        new = [alarm for alarm in found if alarm.code not in self.raised]
        self.raised += [alarm.code for alarm in new]
        return new


History = list[dict[str, float]]
Check = Callable[[History, History, Alarms], Iterator[Alarm]]
"""(all updates, those in which the policy learned, the stage) -> what is wrong."""


def _lasting(rows: History, name: str, wrong: Callable[[float], bool]) -> bool:
    """Whether a number was wrong in the last few updates, one after another."""
    last = [row[name] for row in rows[-WINDOW:] if name in row]
    return len(last) == WINDOW and all(map(wrong, last))


def kl_runaway(history: History, moving: History, stage: Alarms) -> Iterator[Alarm]:
    """KL above half of what ends the stage, and still growing."""
    limit, name = stage.options.kl_limit, "objective/kl_k1"
    if _lasting(moving, name, lambda kl: kl > limit / 2) and moving[-1][name] > moving[-WINDOW][name]:
        yield Alarm(
            "kl_runaway",
            f"the policy runs away from its parent: {moving[-1][name]:.3g} nats of KL per reply and growing",
            f"raise {stage.where}.kl_coef, lower {stage.where}.lr, or set {stage.where}.kl_target",
        )


def entropy_collapse(history: History, moving: History, stage: Alarms) -> Iterator[Alarm]:
    """Next to nothing left of the entropy that there was."""
    name = "objective/entropy"
    begun = history[0][name]
    if begun > 0.1 and _lasting(moving, name, lambda now: now < 0.05 * begun):
        yield Alarm(
            "entropy_collapse",
            f"the policy gives nearly the same reply every time: entropy fell from {begun:.3g} to "
            f"{moving[-1][name]:.3g} nats per token, so there is nothing left to learn from",
            f"lower {stage.where}.lr or {stage.where}.ppo_epochs, or raise {stage.where}.kl_coef",
        )


def length_drift(history: History, moving: History, stage: Alarms) -> Iterator[Alarm]:
    """Replies more than twice as long as at the start, or less than half as long."""
    name = "response/len_mean"
    begun = history[0][name]
    if begun >= 2 and _lasting(moving, name, lambda now: not begun / 2.5 <= now <= begun * 2.5):
        way = "longer" if moving[-1][name] > begun else "shorter"
        yield Alarm(
            "length_drift",
            f"replies get ever {way}: {begun:.3g} tokens at the start, {moving[-1][name]:.3g} now; the reward model "
            "may love length for its own sake",
            f"give the reward model pairs of all lengths, or raise {stage.where}.kl_coef",
        )


def repetition(history: History, moving: History, stage: Alarms) -> Iterator[Alarm]:
    """Many tokens that repeat the one before, far more than at the start."""
    name = "response/repeat_rate"
    begun = history[0][name]
    if _lasting(moving, name, lambda now: now > max(0.2, 3 * begun)):
        yield Alarm(
            "repetition",
            f"{100 * moving[-1][name]:.0f} % of the reply tokens repeat the one before ({100 * begun:.0f} % at the "
            "start); the reward model pays for it",
            "add repeated replies to the rejected ones of its pairs, or raise kl_coef",
        )


def ends(history: History, moving: History, stage: Alarms) -> Iterator[Alarm]:
    """Replies that no longer end."""
    name = "response/eos_rate"
    begun = history[0][name]
    if _lasting(moving, name, lambda now: now < 0.5 * begun or now < begun - 0.3):
        yield Alarm(
            "missing_ends",
            f"replies stop ending: {100 * begun:.0f} % did at the start, {100 * moving[-1][name]:.0f} % do now",
            f"raise {stage.where}.missing_eos_penalty, or {stage.where}.max_new_tokens where replies are cut",
        )
    elif begun < 0.05 and len(history) == WINDOW and _lasting(history, name, lambda now: now < 0.05):
        yield Alarm(
            "missing_ends",
            f"hardly any reply ends within {stage.options.max_new_tokens} tokens, from the start on",
            f"raise {stage.where}.max_new_tokens, or see that the rows of sft end in the end token",
        )


def critic(history: History, moving: History, stage: Alarms) -> Iterator[Alarm]:
    """A critic that is worse than a constant once it is warm."""
    name = "value/explained_var"
    if _lasting(moving, name, lambda now: now < -0.2):
        yield Alarm(
            "critic",
            f"the critic is worse than a constant (explained variance {moving[-1][name]:.2g})",
            f"raise {stage.where}.critic_warmup, change {stage.where}.value_lr_ratio, or take advantage=rloo",
        )


def reward_spread(history: History, moving: History, stage: Alarms) -> Iterator[Alarm]:
    """Scores that are all alike, or that the normalisation does not fit."""
    spread, mean = "objective/score_spread", "objective/score_shaped"
    clip, first = stage.options.reward_clip, history[0]
    if _lasting(history, spread, lambda now: now < 0.01):
        yield Alarm(
            "constant_reward",
            f"every reply gets the same reward (deviation {history[-1][spread]:.2g}): it teaches nothing",
            "look at the replies in samples.jsonl, and at what rewards them: the reward model's accuracy, or the rules",
        )
    elif len(history) == 1:
        least = 0.0 if stage.own_scale else 0.05
        if not least <= first[spread] <= 5 or abs(first[mean]) > min(5.0, 0.8 * clip):
            yield Alarm(
                "reward_scale",
                f"rewards of the first replies have mean {first[mean]:.3g} and deviation {first[spread]:.3g} where "
                "about 0 and 1 are meant: their normalisation does not fit these replies",
                f"set normalise=start for the signals of {stage.where}.reward, or other weights"
                if stage.own_scale
                else "train the reward model on replies like these, or measure it again",
            )


def step_size(history: History, moving: History, stage: Alarms) -> Iterator[Alarm]:
    """A policy that does not move, or that jumps: a third of what ends the stage in one update, or most ratios."""
    kl, clipped, where = "objective/kl_k1", "policy/clipfrac", stage.where
    jumped = moving[-1][kl] - moving[-2][kl] if len(moving) > 1 else 0.0
    # at its second update the policy has learned once
    if len(moving) > WINDOW and _lasting(moving, kl, lambda now: abs(now) < 1e-6):
        yield Alarm(
            "frozen_policy",
            f"the policy does not move: KL per reply is {moving[-1][kl]:.1e} after {len(moving) - 1} updates",
            f"raise {where}.lr, or see in grad_norm of metrics.jsonl whether its adapter has a gradient",
        )
    if jumped > stage.options.kl_limit / 3 or _lasting(moving, clipped, lambda now: now > 0.5):
        yield Alarm(
            "large_steps",
            f"the last update moved the policy by {jumped:.3g} nats of KL per reply and had "
            f"{100 * moving[-1].get(clipped, 0.0):.0f} % of its ratios clipped: steps are too large to be trusted",
            f"lower {where}.lr or {where}.ppo_epochs",
        )


CHECKS: tuple[Check, ...] = (
    step_size,
    kl_runaway,
    entropy_collapse,
    length_drift,
    repetition,
    ends,
    critic,
    reward_spread,
)
READ = (
    "objective/kl_k1",
    "objective/entropy",
    "objective/score_shaped",
    "objective/score_spread",
    "response/len_mean",
    "response/repeat_rate",
    "response/eos_rate",
    "value/explained_var",
    "policy/clipfrac",
)
"""The numbers that alarms look at."""
