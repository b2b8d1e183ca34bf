"""answer_table: one question and one answer per style column, {"prompt", "<style>": answer, ..., "<topic column>"}.

No column says that the others are answers, so the format is read only where it is named (`format=answer_table`). From
such a table come dialogues (a mixture of styles), preferences (one style over another) and the negatives that a
reward model needs to learn more than style: answers of another topic, and damaged answers. Every draw is a hash of
the prompt and the seed, so it does not depend on the order of rows or on the platform.

Extra pairs have ids `file:row#off_topic0`, `file:row#malformed0`. Noise is only marked here (`meta["flip"]`); labels
are flipped for training rows alone, so that evaluation measures the truth.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from data_prep.core.errors import UserError, unknown
from data_prep.core.hashing import draw
from data_prep.formats.base import FORMATS, Format, Found
from data_prep.formats.column_checks import features_of, meta_of, text_field, text_of
from data_prep.formats.corruption import damaged
from data_prep.sources.rows import Row, Skip
from data_prep.types import CONVERSATION, PREFERENCE, PROMPT, Conversation, Message, Preference, Prompt

TOPICS = ("topic", "scenario")
STYLE = "style"
"""Value of the option `features`: not a column, but the style that is drawn."""
_NOT_STYLES = {"prompt", "split", "task", "id", "source", "features", *TOPICS}


@FORMATS.register("answer_table")
class AnswerTable(Format):
    """A question answered in several styles."""

    kinds = (CONVERSATION, PREFERENCE, PROMPT)
    spellings = (("prompt", *TOPICS),)
    by_name = True
    option_help: ClassVar[Mapping[str, str]] = {
        "topic": "column that holds the topic (default: topic or scenario)",
        "styles": "style column -> weight in the mixture of dialogues (default: all columns of answers alike)",
        "preferred": "style column whose answer is chosen",
        "other": "style column whose answer is rejected, or a list of them (a row draws one)",
        "features": "features of a row: style (the one that it is answered in; of a pair: preferred), or a column",
        "history": "share of rows that begin with one or two exchanges of other rows of their side (0 to 1)",
        "noise": "share of training preferences whose label is flipped (0 to 1)",
        "off_topic": "extra pairs per row: an answer against another topic's in the same style (fractions allowed)",
        "malformed": "extra pairs per row against a damaged answer (fractions allowed)",
    }

    def __init__(self, options: dict[str, Any] | None = None, seed: int = 0) -> None:
        super().__init__(options, seed)
        self.history = self._number("history", most=1.0)
        self._sides: dict[str, list[Row]] = {}
        self.noise = self._number("noise", most=1.0)
        self.off_topic = self._number("off_topic")
        self.malformed = self._number("malformed")

    @classmethod
    def reads(cls, keys: frozenset[str], kind: str) -> frozenset[str]:
        """All columns: those without another meaning are answers."""
        return keys

    # ----------------------------------------------------------------- records
    def conversation(self, row: Row) -> Conversation:
        """The question, answered in the style that the row draws from the mixture."""
        asked = text_field(row, "prompt")
        style = self._style(row, asked)
        messages = (*self._asked(row, asked), Message("assistant", self._answer(row, style)))
        return Conversation(messages, row.id, {**self._meta(row, style), "style": style})

    def prompt(self, row: Row) -> Prompt:
        """The question with its topic."""
        asked = text_field(row, "prompt")
        style = self._style(row, asked) if self.options.get("features") == STYLE else ""
        return Prompt(self._asked(row, asked), row.id, self._meta(row, style))

    def preference(self, row: Row) -> Preference:
        """The preferred style over the other one (of several, the row draws one).

        Raises:
            UserError: both answers are equal (code "equal_sides").
        """
        asked = text_field(row, "prompt")
        preferred = str(self.options["preferred"])
        other = _pick([str(name) for name in _listed(self.options["other"])], "other", self.seed, asked)
        chosen, rejected = self._answer(row, preferred), self._answer(row, other)
        if chosen.split() == rejected.split():
            raise row.problem(other, f"the same answer as in {preferred}", code="equal_sides")
        flip = draw("noise", self.seed, asked) < self.noise
        pair = self._pair(row, asked, chosen, rejected)
        return replace(pair, meta={**pair.meta, "flip": True}) if flip else pair

    def conversations(self, rows: Iterable[Row]) -> Found[Conversation]:
        """Every row as a dialogue, or its error."""
        return super().conversations(self._checked(rows))

    def prompts(self, rows: Iterable[Row]) -> Found[Prompt]:
        """Every row as a prompt, or its error."""
        return super().prompts(self._checked(rows))

    def preferences(self, rows: Iterable[Row]) -> Found[Preference]:
        """The preference of every row, then its off-topic and malformed pairs."""
        rows = self._checked(rows, ("preferred", "other"))
        topics: dict[str, list[Row]] = {}
        if self.off_topic:
            for row in rows:
                topics.setdefault(self._topic(row, need=True), []).append(row)
            if len(topics) < 2:
                raise UserError("off_topic pairs need rows of at least two topics", code="one_topic")
        for row in rows:
            try:
                yield self.preference(row)
            except UserError as problem:
                if problem.code != "equal_sides":
                    yield problem
                    continue
                yield Skip("equal_sides")
            answers = self._answers(row)
            asked = row.data["prompt"]
            for number in range(self._times(self.off_topic, "off_topic", asked)):
                key = ("off_topic", self.seed, number, asked)
                chosen, rejected = self._elsewhere(row, topics, answers, key)
                yield self._pair(row, asked, chosen, rejected, "off_topic", number)
            for number in range(self._times(self.malformed, "malformed", asked)):
                key = ("malformed", self.seed, number, asked)
                chosen = _pick(answers, "chosen", *key)
                rejected = damaged(chosen, asked, answers, lambda *more, key=key: draw(*key, *more))
                yield self._pair(row, asked, chosen, rejected, "malformed", number)

    # ----------------------------------------------------------------- insides
    def _checked(self, rows: Iterable[Row], needed: Sequence[str] = ()) -> list[Row]:
        """All rows, once the options are known to fit them; they are where earlier exchanges are drawn from."""
        found = list(rows)
        self._check(found, needed)
        if self.history:
            self._sides = self._by_side(found)
        return found

    def _by_side(self, rows: Sequence[Row]) -> dict[str, list[Row]]:
        """Rows by their column `split`: what is held out must not be heard in front of a row to train on."""
        sides: dict[str, list[Row]] = {}
        for row in rows:
            if not isinstance(row.data.get("split"), str):
                raise UserError(
                    "the option 'history' needs a column 'split' (train or eval) in every row, so that no held-out row "
                    "is heard in training",
                    code="missing_column",
                    field="options.history",
                )
            sides.setdefault(row.data["split"], []).append(row)
        return sides

    def _style(self, row: Row, asked: str) -> str:
        """The style that the row draws from the mixture."""
        weights = self._weights(row)
        place = draw("style", self.seed, asked) * sum(weights.values())
        style = next(iter(weights))
        for name, weight in weights.items():
            if weight > 0:
                style = name
                if place < weight:
                    break
            place -= weight
        return style

    def _asked(self, row: Row, asked: str) -> tuple[Message, ...]:
        """The question, behind exchanges of other rows of its side where the row draws some.

        They are in the style of the row's dialogue, so a reply to learn from never changes it. The draws are those of
        the question alone: dialogue, pairs and prompt of a row begin alike.
        """
        key = ("history", self.seed, asked)
        if draw(*key) >= self.history:
            return (Message("user", asked),)
        style = self._style(row, asked)
        others = self._sides[row.data["split"]]
        found: list[Message] = []
        heard = {asked}
        for place in range(1 + (draw("length", *key) < 0.5)):
            other = others[int(draw(place, *key) * len(others))]
            question, answer = (str(other.data.get(name) or "") for name in ("prompt", style))
            if question not in heard and question.strip() and answer.strip():
                heard.add(question)
                found += [Message("user", question), Message("assistant", answer)]
        return (*found, Message("user", asked))

    def _pair(
        self, row: Row, asked: str, chosen: str, rejected: str, kind: str | None = None, number: int = 0
    ) -> Preference:
        """A pair of a row; extra ones are of a kind, which stands in their id and is their task."""
        suffix = f"#{kind}{number}" if kind else ""
        meta = self._meta(row, str(self.options["preferred"])) | ({"task": kind} if kind else {})
        return Preference(self._asked(row, asked), chosen, rejected, row.id + suffix, None, meta)

    def _number(self, name: str, most: float | None = None) -> float:
        value = self.options.get(name, 0.0)
        wrong = isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0
        if wrong or value == float("inf") or (most is not None and value > most):
            limit = f"from 0 to {most:g}" if most is not None else "of at least 0"
            raise UserError(
                f"wrong value (got {value!r}; expected a number {limit})", field=f"options.{name}", code="bad_option"
            )
        return float(value)

    def _times(self, share: float, what: str, asked: str) -> int:
        """`share` as a whole number of times: its fraction is a chance, drawn by hash."""
        return int(share) + (draw(what, "times", self.seed, asked) < share - int(share))

    def _topic(self, row: Row, need: bool = False) -> str:
        column = self.options.get("topic") or next((name for name in TOPICS if name in row.data), None)
        if column is None or row.data.get(column) is None:
            if need or column is not None:
                raise row.problem(column or "topic", "is missing (got null; expected the row's topic)")
            return ""
        return str(row.data[column])

    def _meta(self, row: Row, style: str) -> dict[str, Any]:
        topic, named = self._topic(row), self.options.get("features")
        meta = {**({"topic": topic} if topic else {}), **meta_of(row)}
        if named:
            meta |= {"features": style} if named == STYLE else features_of(row, str(named))
        return meta

    def _style_columns(self, row: Row) -> list[str]:
        held = {*_NOT_STYLES, self.options.get("topic"), self.options.get("features")}
        return [name for name, value in row.data.items() if name not in held and isinstance(value, str)]

    def _weights(self, row: Row) -> dict[str, float]:
        styles = self.options.get("styles") or dict.fromkeys(self._style_columns(row), 1.0)
        for name, weight in styles.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
                raise UserError(
                    f"wrong weight (got {weight!r}; expected a number of at least 0)",
                    field=f"options.styles.{name}",
                    code="bad_option",
                )
        if not sum(styles.values()) > 0:
            raise UserError("no style has a weight above 0", field="options.styles", code="bad_option")
        return dict(styles)

    def _check(self, rows: Sequence[Row], needed: Sequence[str] = ()) -> None:
        """Refuse options that name no column of any row, and missing ones, before rows are looked at one by one."""
        columns = {key for row in rows for key in row.data}
        for option in needed:
            if not self.options.get(option):
                raise UserError(
                    f"preferences from an answer_table need the option '{option}' "
                    f"(columns: {', '.join(self._style_columns(rows[0]))})",
                    code="missing_option",
                    field=f"options.{option}",
                )
        named = [(o, name) for o in ("topic", "preferred", "other") for name in _listed(self.options.get(o))]
        features = [] if self.options.get("features") in (None, "", STYLE) else [("features", self.options["features"])]
        for option, column in named + features + [("styles", column) for column in self.options.get("styles") or {}]:
            if column not in columns:
                kind = f"{option} column" if option in ("topic", "features") else "style column"
                raise unknown(kind, str(column), columns)

    def _answer(self, row: Row, style: str) -> str:
        """The row's answer in a style."""
        return text_of(row, style, row.data[style]) if style in row.data else text_field(row, style)

    def _used_styles(self, row: Row) -> list[str]:
        """Columns of the styles that dialogues or preferences are made of."""
        columns = list(self.options.get("styles") or self._style_columns(row))
        given = [self.options.get("preferred"), *_listed(self.options.get("other"))]
        return list(dict.fromkeys([*columns, *(name for name in given if name)]))

    def _answers(self, row: Row) -> list[str]:
        """The row's distinct answers in the styles in use."""
        texts = [row.data.get(name) for name in self._used_styles(row)]
        return list(dict.fromkeys(text for text in texts if isinstance(text, str) and text.strip()))

    def _elsewhere(
        self, row: Row, topics: dict[str, list[Row]], answers: list[str], key: tuple[Any, ...]
    ) -> tuple[str, str]:
        """(an answer of this row, an answer of another topic in the same style): only the topic tells them apart."""
        own = self._topic(row)
        others = [topic for topic in topics if topic != own]
        styles = [name for name in self._used_styles(row) if row.data.get(name) in answers]
        for attempt in range(100):
            style = _pick(styles, "style", attempt, *key)
            topic = _pick(others, "topic", attempt, *key)
            there = topics[topic][int(draw("row", attempt, *key) * len(topics[topic]))]
            text = there.data.get(style)
            if isinstance(text, str) and text.strip() and text not in answers:
                return row.data[style], text
        raise row.problem(None, "no other topic has an answer that differs from this row's", code="one_topic")


def _listed(value: Any) -> list[Any]:
    """One name or a list of names, as a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value] if value else []


def _pick(choices: Sequence[str], *key: object) -> str:
    return choices[int(draw(*key) * len(choices))]
