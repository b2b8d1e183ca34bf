"""The moving average of the policy's weights: its numbers, what answers held-out prompts, and what is handed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from align.config.registries import adapters
from align.rl.held_out import HeldOut
from align.rl.watch import Watch
from align.stages.ppo import PPO
from tests.align.rl.tiny_loop import Went, went

DECAY = 0.6
State = dict[str, torch.Tensor]


def has_word(ids: list[int], ended: bool) -> float:
    return float(20 in ids)


class Seen:
    """The policy's weights before every look and behind every update, as they are trained and at the look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: list[State] = []
        self.looked: list[State] = []
        ends, look = Watch.ends, HeldOut.look

        def own(updater: Any) -> State:
            return {name: p for name, p in updater.weights().items() if name.startswith("policy.")}

        def watched(watch: Watch, *given: Any) -> bool:
            self.trained.append(own(watch._updater))
            ended = ends(watch, *given)
            assert all(torch.equal(p, self.trained[-1][name]) for name, p in own(watch._updater).items())
            return ended

        def looked(held_out: HeldOut, *given: Any) -> Any:
            self.looked.append(
                {f"policy.{n}": p.detach().clone() for n, p in held_out._roles.policy.named_parameters()}
            )
            return look(held_out, *given)

        monkeypatch.setattr(Watch, "ends", watched)
        monkeypatch.setattr(HeldOut, "look", looked)

    def averages(self, start: State) -> list[State]:
        """By the definition, in float64."""
        found, now = [], {name: p.double() for name, p in start.items()}
        for weights in self.trained:
            now = {name: DECAY * e + (1 - DECAY) * weights[name].double() for name, e in now.items()}
            found.append(now)
        return found


def close(one: State, other: State) -> bool:
    return all(torch.allclose(one[name].double(), p, atol=1e-7, rtol=1e-6) for name, p in other.items())


def handed_over(found: Went) -> State:
    assert found.roles is not None
    return {f"policy.{name}": p.detach() for name, p in found.roles.policy.named_parameters()}


def test_held_out_prompts_are_answered_by_the_average_and_the_best_of_it_is_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on with the weights it had: the look leaves no trace in them."""
    seen, known = Seen(monkeypatch), iter([0.1, 0.2, 0.9, 0.3, 0.4])
    gold = lambda prompts, *_: [{"score": score} for score in [next(known)] for _ in prompts]  # noqa: E731
    found = went(tmp_path, has_word, updates=4, ema_decay=DECAY, gold=gold, eval_every=1)
    averages = seen.averages(seen.looked[0])
    assert len(averages) == 4 and len(seen.looked) == 5
    for k, average in enumerate(averages):
        assert close(seen.looked[k + 1], average)
        assert not close(seen.trained[k], average), "the two are told apart"
    assert found.result["best_update"] == 2 and close(handed_over(found), averages[1])


def test_where_nothing_is_looked_at_the_last_average_is_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, start = Seen(monkeypatch), {}
    begun = Watch.begin
    monkeypatch.setattr(
        Watch, "begin", lambda watch, rule: (start.update(watch._updater.weights()), begun(watch, rule))
    )
    found = went(tmp_path, has_word, updates=3, ema_decay=DECAY)
    assert close(handed_over(found), seen.averages(start)[-1]) and not close(seen.trained[-1], seen.averages(start)[-1])


@pytest.mark.parametrize(
    ("method", "allowed"), [("lora", True), ("full", True), ("adalora", False), ("delta_lora", False)]
)
def test_methods_that_move_other_weights_too_are_refused(method: str, allowed: bool) -> None:
    problems = list(PPO(ema_decay=0.9).refusals("stages.ppo", adapters.get(method)(), None))
    assert [each.field for each in problems] == ([] if allowed else ["stages.ppo.ema_decay"])
    assert all(method in each.message and "adapter=lora" in each.hint for each in problems)


def test_an_average_over_more_updates_than_there_are_is_asked_about() -> None:
    def asked(**more: Any) -> list[str | None]:
        return [
            each.field
            for each in PPO(updates=20, critic_warmup=0, **more).doubts("stages.ppo", adapters.get("lora")(), 1.0)
        ]

    assert asked(ema_decay=0.99) == ["stages.ppo.ema_decay"] and asked(ema_decay=0.9) == []
