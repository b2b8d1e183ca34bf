"""Signal "rule": a program of reward/rules/ that scores replies. Its options stand beside its name.

No model, no memory; costs what the rule costs. Rules are also gold judges (`data.gold.rule`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from align.rl.signals.base import Said, Scorer, Site, Source, Verdict, kinds
from data_prep.core.errors import UserError
from data_prep.core.options import convert, option
from data_prep.records.stream import source_rows
from reward.rules import build_rule, verdict

if TYPE_CHECKING:
    from data_prep.options import DataOptions
    from reward.rules import Rule


@kinds.register("rule")
@dataclass
class RuleSource(Source):
    """Scores replies by a rule."""

    rule: str = option("", "rule that scores replies, one of reward/rules/; its options stand beside it")
    options: dict[str, Any] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, values: dict[str, Any], where: str) -> Source:
        """Whatever stands beside the rule's name is an option of the rule."""
        source = cls(convert(str, values["rule"], f"{where}.rule"))
        source.options = {key: value for key, value in values.items() if key != "rule"}
        return source

    @property
    def default_name(self) -> str:
        """The rule's."""
        return self.rule

    def check(self, where: str, data: DataOptions) -> None:
        """It can be built."""
        self._built(where, data)

    @property
    def rule_name(self) -> str | None:
        """Itself."""
        return self.rule

    def open(self, where: str, site: Site) -> Scorer:
        """Its verdict on every reply, with its parts."""
        rule = self._built(where, site.data)

        def score(said: Said) -> list[Verdict]:
            rows = zip(said.prompts, said.texts, said.finished, strict=True)
            return [verdict(self.rule, rule, row, text, finished) for row, text, finished in rows]

        return score

    def _built(self, where: str, data: DataOptions) -> Rule:
        """The rule; the gold rule's options are its own by default."""
        is_gold = self.rule == data.gold.rule and not self.options
        options = data.gold.options if is_gold else self.options
        return build_rule(self.rule, options, lambda: _table(data), where)


def _table(data: DataOptions) -> list[dict[str, Any]]:
    """The rows that rules read.

    Raises:
        UserError: none are named, or they cannot be read.
    """
    if not (data.gold.source.path or data.gold.source.generator):
        raise UserError("the rule has no rows", field="data.gold.source", hint="set data.gold.source.path=FILE")
    return source_rows(data, data.gold.source)
