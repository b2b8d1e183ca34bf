"""rated: {"prompt", "response", "score"}: one reply and its grade in a row; replies to one prompt make pairs.

The grade may be called rating, helpfulness (HelpSteer, arXiv 2311.09528), overall_score or reward; more is better. As
dialogues all rows are read, whatever their grades.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from data_prep.core.errors import UserError
from data_prep.formats.base import FORMATS, Found, Spellings, each, pair
from data_prep.formats.column_checks import meta_of, number_of
from data_prep.formats.prompt_completion import PromptCompletion
from data_prep.formats.ranked import pairs_of
from data_prep.formats.turns import reply_of
from data_prep.sources.rows import Row, Skip
from data_prep.types import CONVERSATION, PREFERENCE, PROMPT, Preference, Prompt

_SCORES = ("score", "rating", "helpfulness", "overall_score", "reward")
_COLUMNS = (("prompt", "completion"), ("prompt", "response"), ("query", "response"))


@FORMATS.register("rated")
class Rated(PromptCompletion):
    """A prompt, a reply, and how good it is."""

    kinds = (CONVERSATION, PREFERENCE, PROMPT)
    spellings: ClassVar[Spellings] = tuple((*columns, score) for columns in _COLUMNS for score in _SCORES)
    writes = ""
    option_help: ClassVar[Mapping[str, str]] = {
        **PromptCompletion.option_help,
        "score": f"column of the grade (default: the first of {', '.join(_SCORES)})",
        "min_gap": "least difference of two grades that makes a pair (default 0: only ties are skipped)",
        "pairs": "all (default), neighbours in grade, or best_worst",
    }

    def __init__(self, options: dict[str, Any] | None = None, seed: int = 0) -> None:
        super().__init__(options, seed)
        self.pairs = self.choice("pairs", "all", "neighbours", "best_worst")
        gap = self.options.get("min_gap", 0.0)
        if isinstance(gap, bool) or not isinstance(gap, (int, float)) or not gap >= 0:
            raise UserError(
                f"wrong value (got {gap!r}; expected a number of at least 0)",
                field="options.min_gap",
                code="bad_option",
            )
        self.min_gap = float(gap)

    @classmethod
    def reads(cls, keys: frozenset[str], kind: str) -> frozenset[str]:
        """Prompt and reply; grades too where rows are compared by them."""
        return cls.uses(keys) - frozenset(_SCORES if kind == CONVERSATION else ())

    def preferences(self, rows: Iterable[Row]) -> Found[Preference]:
        """Replies to one prompt, the better over the worse; a prompt with one reply or with ties alone is skipped."""
        groups: dict[str, list[tuple[float, str, Row, Prompt]]] = {}

        def place(row: Row) -> Skip:
            field = str(self.options.get("score") or next((name for name in _SCORES if name in row.data), _SCORES[0]))
            score, prompt, right = number_of(row, field, row.data.get(field)), self.prompt(row), self._columns(row)[1]
            said = reply_of(row, right, self.replied(row, right))
            key = json.dumps([[m.role, m.content, m.calls] for m in prompt.messages], sort_keys=True)
            groups.setdefault(key, []).append((score, said, row, prompt))
            return Skip("grouped")

        placed: Found[Preference] = each(place, rows)
        yield from (problem for problem in placed if isinstance(problem, UserError))
        for members in groups.values():
            _, _, first, prompt = members[0]
            made = 0
            for better, worse, gap in pairs_of([(-score, said, score) for score, said, *_ in members], self.pairs):
                if gap is not None and gap > self.min_gap and better.strip() != worse.strip():
                    made += 1
                    more: dict[str, Any] = {"margin": gap, "meta": meta_of(first), "tools": prompt.tools}
                    yield pair(first, prompt.messages, better, worse, f"#pair{made}", **more)
            if not made:
                yield Skip("no_counterpart" if len(members) == 1 else "tied")
