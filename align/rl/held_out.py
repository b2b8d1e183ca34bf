"""Looks at held-out prompts while the policy learns: what it answers there, and whether that is still getting better.

A reward model can be fooled: its score rises while replies get worse ("Scaling Laws for Reward Model
Overoptimization", arXiv 2210.10760). So every few updates the policy answers a fixed set of held-out prompts greedily,
and a measure of its own says how good the answers are: the gold score where the data has a judge, else the reward
less the KL penalty. The weights of the best look are those that the stage hands over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from align.inference.generation import RolloutEngine, Sampling
from align.rl.experience import PPORoles, RewardRule, Rollout, judge, reward, statistics
from align.training.loop import Best
from align.training.processes import as_one, gathered
from reward.metrics import paired_difference

if TYPE_CHECKING:
    from align.inference.generation import Reply
    from align.rl.average import Average
    from align.rl.gold import Gold
    from align.rl.options import PPOOptions
    from align.training.context import StageContext
    from align.training.optimizer import Updater
    from data_prep.types import PromptTokens

SHOWN = (
    "objective/reward",
    "objective/score",
    "objective/score_shaped",
    "objective/kl_k1",
    "objective/entropy",
    "response/len_mean",
    "response/eos_rate",
    "response/repeat_rate",
)
"""What a look logs of what an update logs, beside signals, under the same names; `gold/...` and `response/distinct` are
its own."""
LEAST, LEFT = 0.2, 0.75
"""A part of the measure that was there at all at the start, and the share of it below which it is given up."""


@dataclass(frozen=True)
class Look:
    """What was found at one look."""

    numbers: dict[str, float]
    measures: list[float]
    """How good each reply is, in the order of the prompts."""

    @property
    def measure(self) -> float:
        """Their mean."""
        return math.fsum(self.measures) / len(self.measures)

    @property
    def reward(self) -> float:
        """What the policy is trained for, before the KL penalty."""
        return self.numbers["objective/score_shaped"]


class HeldOut:
    """The held-out prompts of a stage, and what is looked at.

    Args:
        prompts: those that are answered at every look; all processes hold all, and each answers its share.
        gold: judges replies, where that is the measure.
    """

    def __init__(
        self, context: StageContext, prompts: Sequence[PromptTokens], roles: PPORoles, gold: Gold | None
    ) -> None:
        self._context = context
        self._prompts = prompts
        self._roles = replace(roles, value=None)
        self._gold = gold
        self._engine = RolloutEngine(roles.policy, context.renderer.end_token_id)
        self.by = "reward less its KL penalty" if gold is None else "gold"
        """What the measure of a look is, in words."""

    def look(self, rule: RewardRule, options: PPOOptions) -> Look:
        """Answer the prompts and judge the answers."""
        process = self._context.accelerator
        place = process.process_index % len(self._prompts)  # more processes than prompts: some answer the same
        own = self._prompts[place :: process.num_processes]
        with as_one(process):
            numbers, measures = self._of(own, rule, options)
        parts = gathered(process, [(place, numbers, measures)])
        every = {found: (theirs, each) for ((found, theirs, each),) in parts}
        joined = [every[i % len(every)][1][i // len(every)] for i in range(len(self._prompts))]
        counts = {found: len(each) for found, (_, each) in every.items()}
        weighed = {
            name: sum(every[found][0][name] * count for found, count in counts.items()) / len(self._prompts)
            for name in numbers
        }
        return Look(weighed, joined)

    def _of(
        self, prompts: Sequence[PromptTokens], rule: RewardRule, options: PPOOptions
    ) -> tuple[dict[str, float], list[float]]:
        sampling = Sampling(options.max_new_tokens, greedy=True)
        replies: list[Reply] = []
        with self._context.answering(self._engine.role), self._context.autocast():
            for start in range(0, len(prompts), options.batch_size):
                ids = [row.ids for row in prompts[start : start + options.batch_size]]
                replies += self._engine.generate(ids, sampling)
        rollout = Rollout(prompts, replies)
        signals = rule.signals.at_start() if rule.signals is not None else None
        rule = replace(rule, kl_coef=options.kl_coef)  # as it began, so that looks can be compared
        judged = judge(self._roles, rollout, rule.temperature, options, signals=signals)
        rewards = reward(judged, rollout, rule)
        every = statistics(rollout, judged, rewards, None, rule)
        numbers = {name: value for name, value in every.items() if name in SHOWN or name.startswith("signal/")}
        numbers["response/distinct"] = len({tuple(reply.ids) for reply in replies}) / len(replies)
        if self._gold is None:
            return numbers, rewards.rewards_BT.double().sum(1).tolist()
        verdicts = self._gold(prompts, [self._context.renderer.decode(reply.ids) for reply in replies], replies)
        for part in verdicts[0]:
            numbers[f"gold/{part}"] = math.fsum(verdict[part] for verdict in verdicts) / len(verdicts)
        return numbers, [float(verdict["score"]) for verdict in verdicts]


@dataclass
class Course:
    """What the looks of a stage have shown so far; kept with its state."""

    patience: int
    begun: Look | None = None
    best: Best = field(default_factory=Best)
    best_look: Look | None = None
    fooled: int = 0
    """Looks in a row at which the measure was below its best while the reward was above what it was there."""
    given_up: dict[str, int] = field(default_factory=dict)
    """By part of the measure (`gold/...`): looks in a row at which too little was left of what there was at the start;
    a measure may rise as a whole while one of its parts goes."""

    def take(self, look: Look, update: int, updater: Updater | Average) -> bool:
        """Take a look after an update in; whether the stage should stop, since only the reward still rises."""
        if self.best_look is not None and look.reward > self.best_look.reward and fell(look, self.best_look):
            self.fooled += 1
        else:
            self.fooled = 0
        for part, begun in self.parts():
            lost = look.numbers[part] < LEFT * begun
            self.given_up[part] = self.given_up.get(part, 0) + 1 if lost else 0
        if -look.measure < self.best.loss:
            self.best_look = look
        self.best.offer(-look.measure, update, lambda: {n: p.to("cpu", copy=True) for n, p in updater.held().items()})
        return 0 < self.patience <= self.fooled

    def parts(self) -> list[tuple[str, float]]:
        """The parts of the measure with what they were at the start, where there was something to lose."""
        begun = self.begun.numbers if self.begun is not None else {}
        named = [part for part in begun if part.startswith("gold/") and part != "gold/score"]
        return [(part, begun[part]) for part in named if begun[part] >= LEAST]

    def finish(self, updater: Updater) -> dict[str, Any]:
        """Put the weights of the best look back; what run.json says of it."""
        if self.best.state is None or self.best_look is None:
            return {}
        updater.put_back(self.best.state)
        return {"best_update": self.best.step, "held_out": self.best_look.numbers | {"measure": self.best_look.measure}}

    def state(self) -> dict[str, Any]:
        """All of it, for a state that is kept."""
        looks = {"begun": self.begun, "best_look": self.best_look}
        return {
            "best": vars(self.best),
            "fooled": self.fooled,
            "given_up": dict(self.given_up),
            **{name: asdict(look) if look is not None else None for name, look in looks.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what an earlier run kept."""
        self.best, self.fooled = Best(**state["best"]), state["fooled"]
        self.given_up = dict(state.get("given_up", {}))
        looks = (state["begun"], state["best_look"])
        self.begun, self.best_look = (Look(**look) if look is not None else None for look in looks)


def fell(look: Look, best: Look) -> bool:
    """Whether the measure is below that of another look by more than the standard error of their paired difference."""
    if len(look.measures) < 2:
        return look.measure < best.measure
    change, error = paired_difference(look.measures, best.measures)
    return change < -error


def is_due(update: int, options: PPOOptions) -> bool:
    """Whether there is a look after this update (from 0): at even distances, once the policy moves, and at the end."""
    every = options.eval_every or max(1, math.ceil((options.updates - options.warmup_updates) / 10))
    moved = update + 1 - options.warmup_updates
    return moved > 0 and (moved % every == 0 or update + 1 == options.updates)
