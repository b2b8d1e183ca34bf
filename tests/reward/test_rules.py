"""The rule known_reply, on a table small enough to read."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from data_prep.core.errors import UserError
from reward.rules import rules
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
