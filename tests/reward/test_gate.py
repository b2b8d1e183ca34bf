"""The gate: what it is told by numbers with a planted fault, and that a healthy reward model passes."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from data_prep.types import PairTokens
from reward.gate import gate
from reward.probes import MOST, probes
from reward.quality import quality

END = 99
KINDS = (None, "off_topic", "truncated")


def rows(count: int = 150) -> list[PairTokens]:
    """Pairs of three kinds; the better side is longer in every other one."""
    made = []
    for n in range(count):
        short, long = [n, 2, END], [n, 3, 4, 5, END]
        sides = (long, short) if n % 2 else (short, long)
        made.append(PairTokens([1000 + n], *sides, id=str(n), task=KINDS[n // 2 % 3]))
    return made


def judged(score: Any, given: list[PairTokens] | None = None) -> tuple[dict[str, Any], float]:
    """Numbers and deviation of a reward model that gives `score(row, better side?)`."""
    given = given or rows()
    good, bad = ([float(score(row, side)) for row in given] for side in (True, False))
    mean = math.fsum(good + bad) / (2 * len(given))
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in good + bad) / (2 * len(given)))
    return quality(given, good, bad), std


def healthy(row: PairTokens, better: bool) -> float:
    return (4.0 if better else 0.0) + random.Random(row.id + str(better)).random()


def loves_length(row: PairTokens, better: bool) -> float:
    return float(len(row.chosen if better else row.rejected)) + 0.1 * better


def test_numbers_by_kind_and_by_length() -> None:
    given = rows(6)
    found = quality(given, [1.0, 1.0, 0.0, 2.0, 5.0, 5.0], [0.0, 1.0, 1.0, 0.0, 4.0, 4.0])
    assert {kind: (one["accuracy"], one["n"], one["margin"]) for kind, one in found["by_kind"].items()} == {
        "given": (0.75, 2, 0.5),  # a tie counts half
        "off_topic": (0.5, 2, 0.5),
        "truncated": (1.0, 2, 1.0),
    }
    assert {side: (one["accuracy"], one["n"]) for side, one in found["by_length"].items()} == {
        "longer": (pytest.approx(2.5 / 3), 3),
        "shorter": (pytest.approx(2 / 3), 3),
    }
    assert found["accuracy"] == 0.75 and found["n"] == 6 and found["low"] < 0.75 < found["high"]


def test_a_healthy_one_passes() -> None:
    numbers, std = judged(healthy)
    numbers["probes"] = {"off_topic": {"accuracy": 0.98, "n": 50}, "no_end": {"accuracy": 0.1, "n": 50}}
    assert gate(numbers, std) == {"verdict": "pass", "reasons": []}


@pytest.mark.parametrize(
    ("score", "verdict", "said"),
    [
        (lambda row, better: healthy(row, not better), "refuse", "labels seem turned round"),
        (lambda row, better: 0.5, "refuse", "scores every reply alike"),
        (lambda row, better: random.Random(row.id + str(better)).random(), "refuse", "no better than chance"),
        (lambda row, better: healthy(row, better or row.task == "off_topic"), "refuse", "of the kind off_topic"),
        (loves_length, "warn", "it likes long replies"),
        (lambda row, better: 0.2 * better if int(row.id) % 20 else 0.1, "warn", "off its accuracy"),
    ],
    ids=["swapped", "constant", "chance", "blind to a kind", "length", "calibration"],
)
def test_planted_faults_are_named(score: Any, verdict: str, said: str) -> None:
    found = gate(*judged(score))
    reason = next((one for one in found["reasons"] if said in one), None)
    assert reason is not None and "; try " in reason, found
    assert found["verdict"] == verdict or (said == "it likes long replies" and found["verdict"] == "refuse")


@pytest.mark.parametrize(("accuracy", "verdict"), [(0.95, "pass"), (0.7, "warn"), (0.5, "refuse")])
def test_probes_decide_too(accuracy: float, verdict: str) -> None:
    numbers, std = judged(healthy)
    numbers["probes"] = {"off_topic": {"accuracy": accuracy, "n": 200}}
    found = gate(numbers, std)
    assert found["verdict"] == verdict
    assert verdict == "pass" or "negatives=[same_style_off_topic]" in found["reasons"][0]


def test_the_worst_stands_first_and_few_pairs_say_nothing() -> None:
    numbers, std = judged(healthy)
    numbers["probes"] = {
        "truncated": {"accuracy": 0.7, "n": 100},
        "shuffled": {"accuracy": 0.1, "n": 100},
        "repeated": {"accuracy": 0.0, "n": 19},
        "off_topic_over_rejected": {"accuracy": 0.4, "n": 100},
    }
    found = gate(numbers, std)
    assert found["verdict"] == "refuse" and len(found["reasons"]) == 3 and "(shuffled)" in found["reasons"][0]
    assert gate(*judged(healthy, rows(8)))["verdict"] == "warn", "eight pairs cannot say that it is good"


# ---------------------------------------------------------------------------------------------------------- probes
def test_probes_are_made_of_the_rows_alone() -> None:
    given = [PairTokens([7, 40 + n, 41, 8], [n, 2, 3, 4, END], [n, 5, END], str(n)) for n in range(10)]
    found = probes(given, END, {7, 8, END})
    good = {tuple(row.chosen) for row in given}
    assert all(len(made) == 10 for made in found.values())
    for name, made in found.items():
        for (prompt, better, worse), row in zip(made, given, strict=True):
            assert prompt == row.prompt and better == (
                row.rejected if name == "off_topic_over_rejected" else row.chosen
            )
            assert (worse[-1] == END) == (name != "no_end") and worse not in (row.chosen, row.rejected)
            assert not name.startswith("off_topic") or tuple(worse) in good
            assert name != "truncated" or worse == [*row.chosen[:2], END]
            assert name != "repeated" or worse == [*row.chosen[:2] * 2, END]
            assert name != "shuffled" or sorted(worse) == sorted(row.chosen)
            assert name != "question_echoed" or worse == [row.prompt[1], 41, END]
    assert probes(given, END, {7, 8, END}) == found


def test_probes_leave_out_what_a_row_cannot_give() -> None:
    one = [PairTokens([7], [1, END], [2, END], "a")]
    assert set(probes(one, END, {7, END})) == {"repeated", "no_end"}
    same = [PairTokens([n], [1, END], [2, END], str(n)) for n in range(5)]
    assert "off_topic" not in probes(same, END, set()), "every prompt has the same good reply"
    many = [PairTokens([n], [n, 1, 2, END], [3, END], str(n)) for n in range(MOST + 5)]
    assert {len(made) for made in probes(many, END, set()).values()} == {MOST}


@pytest.mark.parametrize(
    ("kinds", "remedy"), [(("given",), "negatives=[truncated]"), (KINDS, "more pairs of this kind")]
)
def test_a_remedy_is_not_what_was_done_already(kinds: tuple[str | None, ...], remedy: str) -> None:
    numbers, std = judged(healthy)
    numbers["by_kind"] = {kind or "given": {"accuracy": 1.0, "n": 50} for kind in kinds}
    numbers["probes"] = {"truncated": {"accuracy": 0.5, "n": 50}}
    (reason,) = gate(numbers, std)["reasons"]
    assert remedy in reason


def test_chance_as_a_whole_is_the_only_reason() -> None:
    numbers, std = judged(lambda row, better: random.Random(row.id + str(better)).random())
    numbers["probes"] = {"truncated": {"accuracy": 0.5, "n": 50}}
    assert numbers["by_kind"] and len(gate(numbers, std)["reasons"]) == 1
