"""Rules: scores that a program gives, with no model. One file here is one rule; it registers itself.

A rule serves as the gold judge of an evaluation (`data.gold.rule`) and as a reward of PPO (`stages.ppo.reward`). Its
class takes options, and the answer table where it has a parameter of that name; it scores one reply at a time.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from data_prep.core.errors import TrainingStopped, UserError, at_row, unknown
from data_prep.core.options import convert
from data_prep.core.registry import Registry
from data_prep.types import PromptTokens


class Rule(Protocol):
    """What every rule offers once it is built.

    A class with `reads_truth = True` is given the row's right answer too, as the keyword `truth`; one with
    `reads_instructions = True` the row's `instructions`, and its `require` says beforehand whether it can verify them.
    """

    def score(self, prompt_text: str, topic: str, reply_text: str, finished: bool) -> dict[str, float]:
        """Score one reply; the key "score" is the whole, the others its parts, each in 0..1."""
        ...


rules: Registry[Any] = Registry("rule", "reward.rules")


def build_rule(
    name: str, options: dict[str, Any], table: Callable[[], list[dict[str, Any]]], where: str = "data.gold.options"
) -> Rule:
    """The rule called `name`, over the rows that `table` reads where it needs some.

    Args:
        where: dotted path of the options, for errors.

    Raises:
        UserError: no such rule, an option that it does not have or lacks or of a wrong type, or a table that does not
            fit.
    """
    made = rules.get(name)
    takes = dict(inspect.signature(made).parameters)
    kinds = typing.get_type_hints(made.__init__)
    wanted = takes.pop("table", None)
    for key in options:
        if key not in takes:
            raise unknown(f"option of the rule {name}", key, takes)
    missing = [key for key, each in takes.items() if each.default is each.empty and key not in options]
    if missing:
        raise UserError(
            f"the rule {name} lacks {' and '.join(missing)}",
            field=where,
            code="missing_option",
            hint=f"set {where}.{missing[0]}=VALUE",
        )
    given = {key: convert(kinds.get(key, Any), value, f"{where}.{key}") for key, value in options.items()}
    rule: Rule = made(**given, **({"table": table()} if wanted is not None else {}))
    return rule


def require_truth(names: Iterable[str | None], rows: Iterable[PromptTokens]) -> None:
    """Every row has what these rules judge replies by: its right answer, or instructions that can be verified.

    Raises:
        UserError: the first row that has not.
    """
    kinds = [(name, rules.get(name)) for name in names if name is not None]
    readers = [(name, kind) for name, kind in kinds if any(getattr(kind, reads, False) for reads in _READS)]
    for row in rows if readers else ():
        for name, kind in readers:
            given = _read(name, kind, row)
            if "instructions" in given:
                try:
                    kind.require(given["instructions"])
                except UserError as problem:
                    raise at_row(row.id, problem) from problem


_READS = ("reads_truth", "reads_instructions")
"""Attributes of rules that read more of a row than its prompt."""


def _read(name: str, rule: Any, row: PromptTokens) -> dict[str, Any]:
    """What a rule is given of a row beside its prompt."""
    found: dict[str, Any] = {}
    if getattr(rule, "reads_truth", False):
        found["truth"] = str(_field(row, "ground_truth", f"the rule {name} needs the right answer of every prompt"))
    if getattr(rule, "reads_instructions", False):
        found["instructions"] = _field(row, "instructions", f"the rule {name} needs the instructions of every prompt")
    return found


def _field(row: PromptTokens, column: str, said: str) -> Any:
    value = row.meta.get(column)
    if not value and value != 0:
        hint = f"name its column: data.prompts.columns={{{column}: COLUMN}}"
        raise at_row(row.id, UserError(said, field=column, code="no_truth", hint=hint))
    return value


def verdict(name: str, rule: Any, row: PromptTokens, reply_text: str, finished: bool) -> dict[str, float]:
    """What a rule says of one reply, checked.

    Raises:
        UserError: something in the row does not fit the rule.
        TrainingStopped: the rule fails, or gives no finite numbers.
    """
    more = _read(name, rule, row)
    try:
        found = rule.score(row.text, str(row.meta.get("topic", "")), reply_text, finished, **more)
        numbers = {str(key): float(value) for key, value in found.items()}
    except UserError as problem:
        raise at_row(row.id, problem) from problem
    except Exception as problem:
        said = f"{type(problem).__name__}: {problem}"
        raise TrainingStopped(
            f"the rule {name} failed on the reply to {row.id}: {said}", code="rule_failed"
        ) from problem
    if "score" not in numbers or not all(map(math.isfinite, numbers.values())):
        raise TrainingStopped(
            f"the rule {name} gave no finite score to the reply to {row.id} (got {found})", code="rule_failed"
        )
    return numbers
