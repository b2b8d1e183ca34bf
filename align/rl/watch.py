"""Watching over a PPO stage: held-out looks, alarms and the KL limit, what they say, and when they end it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from align.rl.alarms import Alarm, Alarms
from align.rl.average import Average
from align.rl.held_out import Course, HeldOut, Look, fell, is_due
from align.rl.options import OnAlarm, PPOOptions

if TYPE_CHECKING:
    from align.rl.experience import RewardRule
    from align.training.context import StageContext
    from align.training.optimizer import Updater

FOOLED = 2
"""Looks in a row at which only the reward rose, or a part of the measure was gone, before it is told."""
SAME = 0.25
"""Different held-out replies, as a share of those at the start, below which the policy says the same to everyone."""


class Watch:
    """Sees every update's numbers, looks at held-out prompts now and then, and says when a stage should end.

    Args:
        held_out: None where nothing is looked at.
    """

    def __init__(self, context: StageContext, updater: Updater, held_out: HeldOut | None) -> None:
        assert isinstance(updater.options, PPOOptions)
        self._context = context
        self._updater = updater
        self._held_out = held_out
        self._options = updater.options
        self._where = f"stages.{context.spec.name}"
        self._average = Average(updater, self._options.ema_decay) if self._options.ema_decay else None
        self._alarms = Alarms(self._options, self._where)
        self._course = Course(self._options.patience)
        self._ended: dict[str, float] = {}

    def begin(self, rule: RewardRule) -> None:
        """Look at what the policy says before the first update."""
        if self._held_out is not None:
            self._course.begun = self._look(self._held_out, 0, rule)

    def ends(self, update: int, numbers: dict[str, float], rule: RewardRule) -> bool:
        """Take the numbers of an update (from 0) in; whether the stage ends with it.

        The look comes first: where a scorer fails, nothing has been taken in, and the same may be done again.
        """
        look = None
        if self._average is not None:
            self._average.take()
        if numbers["objective/kl_k1"] > self._options.kl_limit:
            self._ended["stopped_on_kl"] = 1.0
        if self._held_out is not None and (self._ended or is_due(update, self._options)):
            look = self._look(self._held_out, update + 1, rule)
        self._alarms.own_scale = rule.signals is not None
        alarms = self._alarms.take(numbers)
        for alarm in alarms:
            self._tell(alarm, update + 1)
        if look is not None:
            if self._course.take(look, update + 1, self._average or self._updater):
                self._ended["stopped_on_monitor"] = 1.0
            alarms += self._of_look(look, update + 1)
        if alarms and self._options.on_alarm is OnAlarm.stop:
            self._ended["stopped_on_alarm"] = 1.0
        return bool(self._ended)

    def finish(self) -> dict[str, Any]:
        """Put the weights of the best look back, or the averaged ones; what run.json says of it and of the end."""
        if self._average is not None:
            self._average.put_back(self._average.held())
        course, found = self._course, self._course.finish(self._updater)
        held_out, begun, best = self._held_out, course.begun, course.best_look
        if held_out is not None and begun is not None and best is not None and fell(best, begun):
            self._context.warn(
                "no_gain",
                f"no update answers the held-out prompts better than the start, by {held_out.by}: {best.measure:.3g} "
                f"at update {course.best.step}, {begun.measure:.3g} before the first",
                f"look at the reward model's accuracy, or lower {self._where}.lr",
            )
        return found | self._ended

    def state(self) -> dict[str, Any]:
        """All of it, for a state that is kept."""
        averaged = {"average": self._average.tensors} if self._average is not None else {}
        return {
            "course": self._course.state(),
            "history": self._alarms.history,
            "raised": self._alarms.raised,
            **averaged,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what an earlier run kept."""
        self._course.restore(state["course"])
        self._alarms.history, self._alarms.raised = list(state["history"]), list(state["raised"])
        if self._average is not None:
            self._average.restore(state["average"])

    def _look(self, held_out: HeldOut, update: int, rule: RewardRule) -> Look:
        averaged = self._average.at_work() if self._average is not None else nullcontext()
        with self._context.phase("look"), averaged:
            look = held_out.look(rule, self._options)
        if self._context.is_main:
            self._context.metrics.log(update, "eval", look.numbers)
        return look

    def _of_look(self, look: Look, update: int) -> list[Alarm]:
        """What a look shows that an update's numbers do not; told once."""
        course, found = self._course, []
        if course.fooled == FOOLED and course.best_look is not None:
            found.append(
                Alarm(
                    "reward_hacked",
                    "the reward rises and replies get worse: held out, the measure fell from "
                    f"{course.best_look.measure:.3g} at update {course.best.step} to {look.measure:.3g}, the reward "
                    f"went from {course.best_look.reward:.3g} to {look.reward:.3g}; update {course.best.step} is kept",
                    f"train the reward model on what it is fooled by, raise {self._where}.kl_coef, or lower "
                    f"{self._where}.lr",
                )
            )
        distinct = "response/distinct"
        if course.begun is not None and look.numbers[distinct] < SAME * course.begun.numbers[distinct]:
            found.append(
                Alarm(
                    "same_reply",
                    f"the policy says the same to most prompts: {100 * look.numbers[distinct]:.0f} % of its held-out "
                    f"replies differ, {100 * course.begun.numbers[distinct]:.0f} % did at the start",
                    "add replies to other questions to the rejected ones of the reward model's pairs",
                )
            )
        lost = [part for part, looks in course.given_up.items() if looks == FOOLED]
        if lost and course.begun is not None:
            (part, *_), begun = lost, course.begun.numbers
            name = part.removeprefix("gold/")
            found.append(
                Alarm(
                    "part_given_up",
                    f"replies give one good up for another: held out, {name} fell from {begun[part]:.3g} at the start "
                    f"to {look.numbers[part]:.3g}, whatever the measure says as a whole",
                    f"give the reward model pairs whose rejected reply lacks it, or raise {self._where}.kl_coef",
                )
            )
        new = [alarm for alarm in found if alarm.code not in self._alarms.raised]
        self._alarms.raised += [alarm.code for alarm in new]
        for alarm in new:
            self._tell(alarm, update)
        return new

    def _tell(self, alarm: Alarm, update: int) -> None:
        self._context.warn(alarm.code, f"at update {update}, {alarm.message}", alarm.hint)
