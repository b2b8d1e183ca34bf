"""The rule known_reply, on a table small enough to read."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from data_prep.core.errors import UserError
from data_prep.types import PromptTokens
from reward.rules import build_rule, require_truth, rules, verdict
from reward.rules.known_reply import KnownReply

TABLE: list[dict[str, Any]] = [
    {"topic": "food", "prompt": "Do you like soup?", "kind": "I love soup.", "terse": "Yes."},
    {"topic": "rain", "prompt": "Is it wet?", "kind": "Take my umbrella!", "terse": "Yes."},
    {"topic": "rain", "prompt": "Will it rain?", "kind": None, "terse": " "},
]


@pytest.fixture
def rule() -> KnownReply:
    return KnownReply(TABLE, topic="topic", styles=["kind", "terse"], preferred="kind")


@pytest.mark.parametrize(
    ("topic", "reply", "finished", "expected"),
    [
        ("food", "I love soup.", True, (1, 1, 1, 1)),
        ("food", "  I love\n soup. ", True, (1, 1, 1, 1)),
        ("food", "I love soup.", False, (0, 1, 1, 0)),
        ("rain", "I love soup.", True, (0, 0, 1, 1)),
        ("food", "Yes.", True, (0, 1, 0, 1)),
        ("rain", "Yes.", True, (0, 1, 0, 1)),
        ("food", "i love soup.", True, (0, 0, 0, 0)),
        ("rain", "", True, (0, 0, 0, 0)),
        ("rain", "None", True, (0, 0, 0, 0)),
    ],
)
def test_scores(rule: KnownReply, topic: str, reply: str, finished: bool, expected: tuple[int, ...]) -> None:
    scored = rule.score("Do you like soup?", topic, reply, finished)
    assert tuple(scored[key] for key in ("score", "topic", "persona", "wellformed")) == expected


def test_registered_under_its_name() -> None:
    assert rules.get("known_reply") is KnownReply
    with pytest.raises(UserError, match="did you mean 'known_reply'"):
        rules.get("known_replies")


def test_wrong_names_offer_the_nearest(rule: KnownReply) -> None:
    with pytest.raises(UserError, match="did you mean 'terse'"):
        KnownReply(TABLE, "topic", ["kind", "tersse"], "kind")
    with pytest.raises(UserError, match="did you mean 'kind'"):
        KnownReply(TABLE, "topic", ["kind", "terse"], "kin")
    with pytest.raises(UserError, match="at least one row"):
        KnownReply([], "topic", ["kind"], "kind")
    with pytest.raises(UserError, match="did you mean 'rain'"):
        rule.score("?", "rains", "Yes.", True)


def test_rules_import_no_torch() -> None:
    code = "import sys, reward.rules as r; r.rules.names(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------- rules that need no table
@pytest.mark.parametrize(
    ("name", "options", "reply", "truth", "finished", "score"),
    [
        ("exact_answer", {}, " a  b\n", "a b", True, 1),
        ("exact_answer", {}, "a b", "a b", False, 0),
        ("exact_answer", {}, "A b", "a b", True, 0),
        ("exact_answer", {"case": False}, "A b", "a b", True, 1),
        ("exact_answer", {"after": "####"}, "so 2 #### 3 #### 4", "2 + 2 #### 4", True, 1),
        ("exact_answer", {"after": "####"}, "#### 4", "4", True, 1),
        ("exact_answer", {"after": "####"}, "4", "#### 4", True, 0),
        ("number", {}, "It is 3, so $1,234.50.", "#### 1234.5", True, 1),
        ("number", {}, "-3", "3", True, 0),
        ("number", {}, "1e3", "1000", True, 1),
        ("number", {}, "3", "3", False, 0),
        ("number", {}, "three", "3", True, 0),
        ("number", {"tolerance": 0.1}, "95", "100", True, 1),
        ("number", {"tolerance": 0.1}, "85", "100", True, 0),
        ("pattern", {"pattern": r"<a>.*</a>"}, " <a>x\ny</a> ", None, False, 1),
        ("pattern", {"pattern": r"<a>.*</a>"}, "so <a>x</a>", None, True, 0),
        ("pattern", {"pattern": "x", "whole": False}, "so <a>x</a>", None, True, 1),
        ("length", {"target": 4}, "a b c d", None, True, 1),
        ("length", {"target": 4}, "a", None, True, 0.25),
        ("length", {"target": 4}, "a b c d e f", None, True, 0.5),
        ("length", {"target": 1}, "a b c d e f", None, True, 0),
        ("repetition", {"words": 1}, "a a a b", None, True, 0.5),
        ("repetition", {}, "a b c a b c", None, True, 0.75),
        ("repetition", {}, "a b", None, True, 1),
        ("forbidden", {"texts": ["as an AI"]}, "As an ai, no", None, True, 0),
        ("forbidden", {"texts": ["as an AI"], "case": True}, "As an ai, no", None, True, 1),
        ("forbidden", {"texts": ["x", "y"]}, "a", None, True, 1),
    ],
)
def test_what_a_rule_says(
    name: str, options: dict[str, Any], reply: str, truth: str | None, finished: bool, score: float
) -> None:
    row = PromptTokens([1], "?", "f:1", {} if truth is None else {"ground_truth": truth})
    found = verdict(name, build_rule(name, options, list), row, reply, finished)
    assert found["score"] == pytest.approx(score)


def test_a_row_that_does_not_fit_is_named() -> None:
    rule = build_rule("number", {}, list)
    with pytest.raises(UserError, match="f:1:ground_truth: the rule number needs the right answer"):
        verdict("number", rule, PromptTokens([1], "?", "f:1"), "1", True)
    with pytest.raises(UserError, match="f:1:ground_truth: the right answer has no number"):
        verdict("number", rule, PromptTokens([1], "?", "f:1", {"ground_truth": "no"}), "1", True)
    require_truth([None, "length"], [PromptTokens([1], "?", "f:1")])
    answered = PromptTokens([1], "?", "f:1", {"ground_truth": 0})
    with pytest.raises(UserError, match="f:2:ground_truth"):
        require_truth(["length", "number"], [answered, PromptTokens([1], "?", "f:2")])
