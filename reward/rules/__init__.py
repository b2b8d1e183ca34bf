"""Rule rewards: scores that a program gives, with no model. One file here is one rule; it registers itself.

A rule's class takes the answer table and its options, and scores one reply at a time (see `Rule`).
"""

from __future__ import annotations

from typing import Any, Protocol

from data_prep.registry import Registry


class Rule(Protocol):
    """What every rule offers once it is built."""

    def score(self, prompt_text: str, topic: str, reply_text: str, finished: bool) -> dict[str, float]:
        """Score one reply; the key "score" is the whole, the others its parts, each in 0..1."""
        ...


rules: Registry[Any] = Registry("rule", "reward.rules")
