"""graded: {"instruction", "output_1", "output_2", "preference"}: 1 to 2, below 1.5 the first is better (AlpacaEval).

Other spellings: response_0/response_1 with better_response_id (PKU-SafeRLHF), human_ref_A/human_ref_B with labels
(SHP), answer_0/answer_1 with score_0/score_1 (WebGPT), response_1/response_2 with preference_strength (HelpSteer2) and
response1/response2 with overall_preference (HelpSteer3), both -3 to 3. Rows nearer to a tie than `min_gap` are skipped
and counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from data_prep.core.errors import UserError
from data_prep.formats.alpaca import SYSTEM
from data_prep.formats.base import FORMATS, Found, Several, each, pair
from data_prep.formats.chat_format import CHAT_OPTIONS, ChatFormat
from data_prep.formats.column_checks import find_key, meta_of, number_of, text_field
from data_prep.formats.message_lists import TOOLS
from data_prep.formats.ranked import pairs_of
from data_prep.sources.rows import Row, Skip
from data_prep.types import PREFERENCE, PROMPT, Preference, Prompt

_PROMPTS = ("instruction", "prompt", "question", "history", "context")
_SIDES = {
    ("output_1", "output_2"): ("preference", 1.0, 2.0),
    ("response_0", "response_1"): ("better_response_id", 0.0, 1.0),
    ("human_ref_A", "human_ref_B"): ("labels", 1.0, 0.0),
    ("answer_0", "answer_1"): ("score_0", None, None),
    ("response_1", "response_2"): ("preference_strength", -3.0, 3.0),
    ("response1", "response2"): ("overall_preference", -3.0, 3.0),
}
"""Columns of both replies -> (column of the judgement, its value for the first reply, its value for the second)."""


@FORMATS.register("graded")
class Graded(ChatFormat):
    """A prompt, two replies, and how much better one is."""

    kinds = (PREFERENCE, PROMPT)
    spellings = tuple((name, *sides, grade[0]) for sides, grade in _SIDES.items() for name in _PROMPTS)
    extras = ("input", "score_1", *TOOLS, *SYSTEM)
    option_help: ClassVar[Mapping[str, str]] = {
        **CHAT_OPTIONS,
        "min_gap": "least distance from a tie, as a share of the whole scale (default 0: only ties are skipped)",
        "across": "column of a shared opponent: replies to one prompt are paired by how they did against it",
    }

    def __init__(self, options: dict[str, Any] | None = None, seed: int = 0) -> None:
        super().__init__(options, seed)
        gap = self.options.get("min_gap", 0.0)
        if isinstance(gap, bool) or not isinstance(gap, (int, float)) or not 0 <= gap <= 1:
            raise UserError(
                f"wrong value (got {gap!r}; expected a number from 0 to 1)",
                field="options.min_gap",
                code="bad_option",
            )
        self.min_gap = float(gap)

    def prompt(self, row: Row) -> Prompt:
        """The prompt alone."""
        field = find_key(row, _PROMPTS)
        value = row.data[field]
        if isinstance(value, dict) and "full_text" in value:  # WebGPT
            row = Row(row.file, row.row, {**row.data, field: value["full_text"]})
        messages, tools = self.asked_of(row, field)
        return Prompt(messages, row.id, meta_of(row), tools)

    def preference(self, row: Row) -> Several[Preference]:
        """The better reply over the other one."""
        prompt = self.prompt(row)
        left, right = self._sides(row)
        texts = text_field(row, left), text_field(row, right)
        lead = self._lead(row, left, right)
        if abs(lead) <= max(self.min_gap, 1e-12):
            return Skip("tied")
        chosen, rejected = texts if lead > 0 else texts[::-1]
        more: dict[str, Any] = {"margin": abs(lead), "meta": prompt.meta, "tools": prompt.tools}
        return pair(row, prompt.messages, chosen, rejected, **more)

    def preferences(self, rows: Iterable[Row]) -> Found[Preference]:
        """Every row as a preference; with `across`, the second replies of rows that share prompt and opponent."""
        return self._across(rows) if self.options.get("across") else each(self.preference, rows)

    def _across(self, rows: Iterable[Row]) -> Found[Preference]:
        opponent = str(self.options["across"])
        groups: dict[tuple[str, str], list[tuple[float, str, Row, Prompt]]] = {}

        def place(row: Row) -> Skip:
            left, right = self._sides(row)
            prompt = self.prompt(row)
            said = json.dumps([[message.role, message.content] for message in prompt.messages])
            grade = (self._lead(row, left, right), text_field(row, right), row, prompt)
            groups.setdefault((said, text_field(row, opponent)), []).append(grade)
            return Skip("grouped")

        placed: Found[Preference] = each(place, rows)
        yield from (problem for problem in placed if isinstance(problem, UserError))
        for members in groups.values():
            first, prompt = members[0][2:]
            replies = [(lead, text, -lead) for lead, text, *_ in members]
            made = 0
            for better, worse, gap in pairs_of(replies, "all"):
                if gap is not None and gap > self.min_gap and better.strip() != worse.strip():
                    made += 1
                    more: dict[str, Any] = {"margin": gap, "meta": meta_of(first), "tools": prompt.tools}
                    yield pair(first, prompt.messages, better, worse, f"#pair{made}", **more)
            if not made:
                yield Skip("tied")

    def _sides(self, row: Row) -> tuple[str, str]:
        for left, right in _SIDES:
            if left in row.data and right in row.data:
                return left, right
        raise row.problem(
            "output_1", f"is missing (got the columns {', '.join(map(str, row.data))}; expected two replies)"
        )

    def _lead(self, row: Row, left: str, right: str) -> float:
        """How much better the first reply is, from -1 (the second by all) to 1; WebGPT's scores keep their scale."""
        column, first, second = _SIDES[left, right]
        value = number_of(row, column, row.data.get(column))
        if first is None or second is None:
            return value - number_of(row, "score_1", row.data.get("score_1"))
        low, high = min(first, second), max(first, second)
        if not low <= value <= high:
            raise row.problem(column, f"out of range (got {value:g}; expected {low:g} to {high:g})")
        return 1 - 2 * abs(value - first) / (high - low)
