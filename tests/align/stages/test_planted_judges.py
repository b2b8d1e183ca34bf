"""Faults planted in tiny reward models that are really trained, each named by the gate; a healthy one passes.

A good reply is `topic, style, a few more tokens, end`: the topic is the prompt's, and one of two styles is preferred.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from align.checkpoints.compatibility import ParentMode
from align.config.registries import adapters
from align.config.schema import Load
from align.stages.reward_model import measure, probe
from align.training.loop import fit
from align.training.objectives import Pairwise
from align.training.options import Optimizer
from data_prep.types import PairTokens
from reward.gate import gate
from reward.head import ScalarHead
from reward.probes import probes
from tests.tiny_chain import bases
from tests.tiny_training import options, process, updater

END, ASK, WORD = 1, 50, 77
PREFERRED, OTHER = 30, 31
TOPICS = 4
CONTROL = frozenset({END, ASK})


def reply(drawn: Any, topic: int, style: int, most: int = 4, word: bool = False) -> list[int]:
    more = sorted(drawn.choice(range(60, 70), size=drawn.integers(2, most + 1), replace=False).tolist())
    return [100 + topic, style, *([WORD] if word else []), *more, END]


def pairs(seed: int, count: int, words: bool = False) -> list[PairTokens]:
    """Right pairs: the same topic in both styles; with `words` one word stands on either side by chance."""
    drawn, rows = np.random.default_rng(seed), []
    for number in range(count):
        topic, held = int(drawn.integers(TOPICS)), [words and bool(drawn.integers(2)) for _ in range(2)]
        sides = [reply(drawn, topic, style, word=word) for style, word in zip((PREFERRED, OTHER), held, strict=True)]
        rows.append(PairTokens([10 + topic, ASK], *sides, id=str(number)))
    return rows


def swapped(rows: list[PairTokens]) -> list[PairTokens]:
    return [PairTokens(row.prompt, row.rejected, row.chosen, row.id) for row in rows]


def of_all_kinds(rows: list[PairTokens]) -> list[PairTokens]:
    """The rows, and a bad reply of every kind to each."""
    made = [each for name, found in probes(rows, END, CONTROL).items() if name != "no_end" for each in found]
    return [*rows, *(PairTokens(list(one), list(good), list(bad), "") for one, good, bad in made)]


def longer(rows: list[PairTokens]) -> list[PairTokens]:
    """One style, and the better side has more to say."""
    drawn = np.random.default_rng(9)
    made = []
    for row in rows:
        sides = [reply(drawn, row.prompt[0] - 10, PREFERRED, most=most) for most in (8, 2)]
        made.append(PairTokens(row.prompt, *sorted(sides, key=len, reverse=True), id=row.id))
    return made


def wordy(rows: list[PairTokens]) -> list[PairTokens]:
    """One style, and the better side alone has the word."""
    drawn = np.random.default_rng(9)
    made = []
    for row in rows:
        sides = [reply(drawn, row.prompt[0] - 10, PREFERRED, word=word) for word in (True, False)]
        made.append(PairTokens(row.prompt, *sides, id=row.id))
    return made


@cache
@torch.random.fork_rng(devices=[])  # a test that seeds draws the same, whether this was made before or now
def judged(taught: Callable[[list[PairTokens]], list[PairTokens]] | None, words: bool = False) -> dict[str, Any]:
    """What the gate says of a reward model that was taught pairs, by right pairs that it has not seen.

    None: its head scores everything alike.
    """
    torch.manual_seed(0)
    role = bases().fresh(None, adapters.get("full")(), ParentMode(None, Load.fp32), "reward")
    role.head = ScalarHead(role.tree.config.hidden_size)
    objective, held = Pairwise(role, 0.01), pairs(1, 320, words)
    if taught is None:
        role.head.zero()
    else:
        rows, steps = taught(pairs(2, 160)), 240 if taught is of_all_kinds else 60
        chosen = options(optimizer=Optimizer.adamw, max_steps=steps, batch_size=32, max_grad_norm=1.0)
        fit(updater(objective, chosen, steps, lr=3e-3), rows, [], 0, lambda *_: None)
    found = measure(process(), objective, held, [range(160), range(160, 320)])
    context: Any = SimpleNamespace(renderer=SimpleNamespace(end_token_id=END, control_ids=CONTROL))
    found["metrics"]["probes"] = probe(context, role.eval(), held, 64)
    return {**gate(found["metrics"], found["norm"]["std"]), "metrics": found["metrics"]}


def test_a_healthy_reward_model_passes() -> None:
    found = judged(of_all_kinds)
    assert (found["verdict"], found["reasons"]) == ("pass", []), found


@pytest.mark.parametrize(
    ("taught", "words", "verdict", "said", "remedy"),
    [
        (swapped, False, "refuse", "worse than chance", "swapping chosen and rejected"),
        (None, False, "refuse", "it scores every reply alike", "a larger lr"),
        (longer, False, "refuse", "it likes long replies", "more pairs whose better side is shorter"),
        (wordy, True, "refuse", f"it likes 'token {WORD}'", "more pairs whose worse side has it"),
        (lambda rows: rows, False, "refuse", "a bad one (off_topic)", "negatives=[same_style_off_topic]"),
    ],
    ids=["swapped labels", "constant", "loves length", "loves a word", "blind to the topic"],
)
def test_a_planted_fault_is_named(taught: Any, words: bool, verdict: str, said: str, remedy: str) -> None:
    found = judged(taught, words)
    reason = next((one for one in found["reasons"] if said in one), None)
    assert reason is not None and remedy in reason and "\n" not in reason, found
    assert found["verdict"] == verdict
