"""Rule "known_reply": the reply must be a known one, on the prompt's topic and in the wanted style.

Source: this project's. A table with several styles of answer to each question makes a gold reward that is
exact and cheap, so that a reward model and PPO can be judged without a human or a judge model. It rewards
memory, not wit: a good new reply scores 0, therefore it measures a toolkit, never a chatbot. Cost: a look-up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.core.errors import UserError, unknown
from reward.rules import rules


@rules.register("known_reply")
class KnownReply:
    """Scores replies against the answer table.

    Args:
        table: rows of the table, one question each; a blank cell is no answer.
        topic: the column that holds a row's topic.
        styles: the columns that hold answers, one for each style.
        preferred: the style that is wanted, one of `styles`.

    Raises:
        UserError: the table is empty or has not these columns, or `preferred` is not one of `styles`.
    """

    def __init__(self, table: list[dict[str, Any]], topic: str, styles: list[str], preferred: str) -> None:
        if not table:
            raise UserError("the rule known_reply needs a table with at least one row")
        if preferred not in styles:
            raise unknown("preferred style", preferred, styles)
        for row_number, row in enumerate(table, start=1):
            for column in (topic, *styles):
                if column not in row:
                    problem = unknown("column", column, row)
                    raise UserError(problem.message, code=problem.code, row=row_number)
        self._topics: dict[str, set[str]] = {}
        self._preferred: set[str] = set()
        self._known_topics = {str(row[topic]) for row in table}
        for row in table:
            self._learn(row, str(row[topic]), styles, preferred)

    def _learn(self, row: Mapping[str, Any], topic: str, styles: Sequence[str], preferred: str) -> None:
        for style in styles:
            reply = _normal(row[style])
            if reply:
                self._topics.setdefault(reply, set()).add(topic)
                if style == preferred:
                    self._preferred.add(reply)

    def score(self, prompt_text: str, topic: str, reply_text: str, finished: bool) -> dict[str, float]:
        """Score a reply; every value is 0.0 or 1.0.

        wellformed: it ended (`finished`: the end token was produced) and equals a known reply, white space
        aside; topic: it is a known reply to a question of this topic; persona: it is a known reply in the
        preferred style; score: all three. prompt_text is not read.

        Raises:
            UserError: the table has no such topic, so that every reply would fail unseen.
        """
        if topic not in self._known_topics:
            raise unknown("topic", topic, self._known_topics)
        reply = _normal(reply_text)
        wellformed = finished and reply in self._topics
        on_topic = topic in self._topics.get(reply, ())
        persona = reply in self._preferred
        parts = {"topic": on_topic, "persona": persona, "wellformed": wellformed}
        return {"score": float(all(parts.values())), **{key: float(value) for key, value in parts.items()}}


def _normal(cell: Any) -> str:
    """Text with every run of white space folded to one space; a missing cell is empty."""
    return "" if cell is None else " ".join(str(cell).split())
