"""Rule rewards: scores that a program gives, with no model. One file here is one rule; it registers itself.

A rule's class takes the answer table and its options, and scores one reply at a time (see `Rule`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

from data_prep.core.errors import UserError, unknown
from data_prep.core.registry import Registry


class Rule(Protocol):
    """What every rule offers once it is built."""

    def score(self, prompt_text: str, topic: str, reply_text: str, finished: bool) -> dict[str, float]:
        """Score one reply; the key "score" is the whole, the others its parts, each in 0..1."""
        ...


rules: Registry[Any] = Registry("rule", "reward.rules")


def build_rule(name: str, options: dict[str, Any], table: Callable[[], list[dict[str, Any]]]) -> Rule:
    """The rule called `name` over the rows that `table` reads.

    Raises:
        UserError: no such rule, an option that it does not have or lacks, or a table that does not fit.
    """
    made = rules.get(name)
    known = [key for key in inspect.signature(made).parameters if key != "table"]
    for key in options:
        if key not in known:
            raise unknown(f"option of the rule {name}", key, known)
    missing = [key for key in known if key not in options]
    if missing:
        raise UserError(
            f"the rule {name} lacks {' and '.join(missing)}",
            field="data.gold.options",
            code="missing_option",
            hint=f"set data.gold.options.{missing[0]}=VALUE",
        )
    rule: Rule = made(table=table(), **options)
    return rule
