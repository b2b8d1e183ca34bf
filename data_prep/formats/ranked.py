"""ranked: one prompt and a list of replies with ranks or scores; every two of unequal rank make a pair.

{"prompt", "responses": [...]} with `ranks` (1 is best), `scores` (more is better) or objects {"text", "rank" | "score"}
(Nectar, UltraFeedback, stack-exchange-preferences). Bare lists need `options.order`. Ouyang et al. 2022, arXiv
2203.02155, section 3.5: all pairs of a ranking.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any, ClassVar, TypeAlias

from data_prep.core.errors import UserError
from data_prep.formats.alpaca import SYSTEM
from data_prep.formats.base import FORMATS, Several, pair
from data_prep.formats.chat_format import CHAT_OPTIONS, ChatFormat
from data_prep.formats.column_checks import find_key, list_field, listed, meta_of, number_of, text_of
from data_prep.formats.message_lists import TOOLS
from data_prep.formats.spelled import value_of
from data_prep.sources.rows import Row, Skip
from data_prep.types import CONVERSATION, PREFERENCE, PROMPT, Preference, Prompt

_PROMPTS = ("prompt", "question", "instruction", "query")
_LISTS = ("responses", "answers", "completions", "replies")
_TEXTS = ("text", "answer", "response", "completion", "content", "output")
_RANKS = ("rank", "ranks", "ranking")
_SCORES = ("score", "scores", "rating", "ratings", "overall_score", "pm_score")
Graded: TypeAlias = tuple[float, str, float | None]
"""(order, least first is best; text; score if there is one)"""


def pairs_of(graded: Sequence[Graded], which: str) -> list[tuple[str, str, float | None]]:
    """(better, worse, difference of scores): all pairs, neighbours in rank, or best against worst; no ties."""
    ordered = sorted(graded, key=lambda one: one[0])
    if which == "all":
        chosen = list(combinations(ordered, 2))
    else:
        chosen = list(pairwise(ordered)) if which == "neighbours" else [(ordered[0], ordered[-1])]
    return [(a[1], b[1], _gap(a, b)) for a, b in chosen if a[0] < b[0]]


def _gap(better: Graded, worse: Graded) -> float | None:
    return None if better[2] is None or worse[2] is None else better[2] - worse[2]


def _unfolded(value: Any) -> Any:
    """A list that a table holds as text."""
    try:
        return value_of(value) if isinstance(value, str) and value.lstrip()[:1] == "[" else value
    except ValueError:
        return value


@FORMATS.register("ranked")
class Ranked(ChatFormat):
    """A prompt and replies from best to worst."""

    kinds = (PREFERENCE, PROMPT)
    spellings = tuple((left, right) for left in _PROMPTS for right in _LISTS)
    extras = ("input", "history", *TOOLS, *_RANKS, *_SCORES, *SYSTEM)
    takes_context = True
    option_help: ClassVar[Mapping[str, str]] = {
        **CHAT_OPTIONS,
        "order": "best_first or worst_first: what the order of a bare list means (else such lists are refused)",
        "pairs": "all (default), neighbours in rank, or best_worst",
    }

    def __init__(self, options: dict[str, Any] | None = None, seed: int = 0) -> None:
        super().__init__(options, seed)
        self.order = self.choice("order", "", "best_first", "worst_first")
        self.pairs = self.choice("pairs", "all", "neighbours", "best_worst")

    @classmethod
    def doubt(cls, rows: Sequence[Mapping[str, Any]], kind: str, options: Mapping[str, Any]) -> UserError | None:
        """Replies without ranks or scores are no ranking, and answers that are no list no replies at all."""
        if kind not in (CONVERSATION, PREFERENCE) or options.get("order") or not rows:
            return None
        found = [(name, _unfolded(row[name])) for row in rows for name in _LISTS if row.get(name) is not None]
        if any(key in row for row in rows for key in (*_RANKS, *_SCORES)) or not found:
            return None
        field = found[0][0]
        values = [value for _, given in found for value in (given if isinstance(given, list) else [given])]
        graded = [value for value in values if isinstance(value, dict) and not value.keys().isdisjoint(_TEXTS)]
        if graded and not any(isinstance(value, str) for value in values):
            return None
        if any(isinstance(row.get("labels"), list) for row in rows):
            return UserError(
                f"{field} are the steps of one answer, each with a label: no stage reads stepwise rewards",
                code="stepwise",
                hint="give whole replies: {prompt, chosen, rejected}, or {prompt, completion, label} with one label",
            )
        alone = f"columns={{answer: {field}.0}} imitates the first of them"
        return UserError(
            f"the replies of {field} have no ranks or scores, so that none is known to be better",
            code="no_ranking",
            hint=alone
            if kind == CONVERSATION
            else "give ranks or scores; options.order=best_first says that each list stands from best to worst; "
            f"where all are right answers, {alone}",
        )

    def preference(self, row: Row) -> Several[Preference]:
        """The pairs of the row's ranking."""
        prompt, replies = self.prompt(row), self._graded(row)
        found: list[Any] = []
        for better, worse, gap in pairs_of(replies, self.pairs):
            suffix = f"#pair{len(found) + 1}"
            more: dict[str, Any] = {"margin": gap, "meta": dict(prompt.meta), "tools": prompt.tools}
            found.append(pair(row, prompt.messages, better, worse, suffix, **more))
        return found or Skip("tied")

    def prompt(self, row: Row) -> Prompt:
        """The prompt alone."""
        messages, tools = self.asked_of(row, find_key(row, _PROMPTS))
        return Prompt(messages, row.id, meta_of(row), tools)

    def _graded(self, row: Row) -> list[Graded]:
        field, replies = list_field(row, *_LISTS)
        if len(replies) < 2:
            raise row.problem(field, "has one reply (got 1; expected two or more to compare)")
        texts, grades = [], []
        for number, value in enumerate(replies):
            place = f"{field}[{number}]"
            inner = Row(row.file, row.row, value) if isinstance(value, dict) else None
            key = find_key(inner, _TEXTS) if inner else None
            texts.append(text_of(row, f"{place}.{key}" if key else place, value[key] if key else value))
            grades.append(self._grade(row, place, inner.data) if inner else None)
        if all(grade is None for grade in grades):
            return self._beside(row, field, texts)
        if None in grades:
            raise row.problem(
                f"{field}[{grades.index(None)}]",
                "has no rank or score (got none; expected one, as the other replies have)",
            )
        return [(order, text, score) for text, (order, score) in zip(texts, grades, strict=True)]  # type: ignore[misc]

    def _grade(self, row: Row, place: str, entry: dict[str, Any]) -> tuple[float, float | None] | None:
        """(order, score) of an entry's own rank or score, if it has one."""
        for key in (*_RANKS, *_SCORES):
            if entry.get(key) is not None:
                number = number_of(row, f"{place}.{key}", entry[key])
                return (number, None) if key in _RANKS else (-number, number)
        return None

    def _beside(self, row: Row, field: str, texts: list[str]) -> list[Graded]:
        """Grades from a list beside the replies, or from their order."""
        for key in (*_RANKS, *_SCORES):
            values = listed(row, key, row.data.get(key))
            if values is None:
                continue
            if not isinstance(values, list) or len(values) != len(texts):
                got = len(values) if isinstance(values, list) else 1
                raise row.problem(key, f"does not fit {field} (got {got} values; expected a list of {len(texts)})")
            numbers = [number_of(row, f"{key}[{place}]", value) for place, value in enumerate(values)]
            signs = 1 if key in _RANKS else -1
            scores = [None if key in _RANKS else number for number in numbers]
            return [(signs * n, text, score) for n, text, score in zip(numbers, texts, scores, strict=True)]
        if not self.order:
            raise UserError(
                f"the replies of {field} have no ranks or scores",
                code="missing_option",
                hint="set data.preferences.options.order to best_first or worst_first (align data: options.order)",
                field="options.order",
            )
        ordered = texts if self.order == "best_first" else texts[::-1]
        return [(float(place), text, None) for place, text in enumerate(ordered)]
