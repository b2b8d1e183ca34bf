"""labels: {"prompt", "a", "b", "choice", "labeller"}: which of two replies people preferred, as `align label` writes.

`choice` is a, b, tie or bad (both are). The prompt is the words of one question, or a list of messages. Rows that
compare the same two replies, whichever stood first, are votes on one pair: the side with more votes is the better one,
and nobody votes twice. A pair without a winner is skipped, but replies that most found both bad are bad replies for
stages that read labelled ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from data_prep.core.errors import UserError
from data_prep.formats.base import FORMATS, Found, Spellings, each, pair
from data_prep.formats.chat_format import ChatFormat
from data_prep.formats.column_checks import meta_of, text_of
from data_prep.sources.rows import Row, Skip, short
from data_prep.types import PREFERENCE, PROMPT, UNPAIRED, Labelled, Message, Preference, Prompt

CHOICES = ("a", "b", "tie", "bad")


@dataclass
class _Votes:
    """What was said of two replies to one prompt."""

    row: Row
    prompt: Prompt
    replies: tuple[str, str]
    """In the order of the first vote's row."""
    rows: int = 0
    choices: dict[str, str] = field(default_factory=dict)
    """Labeller -> a (the first reply), b, tie or bad."""

    @property
    def verdict(self) -> str | None:
        """What most say; None where none is said more often than every other."""
        ranked = Counter(self.choices.values()).most_common(2)
        return None if len(ranked) > 1 and ranked[0][1] == ranked[1][1] else ranked[0][0]


@FORMATS.register("labels")
class Labels(ChatFormat):
    """A prompt, two replies, and who preferred which."""

    kinds = (PREFERENCE, UNPAIRED, PROMPT)
    spellings: ClassVar[Spellings] = (("prompt", "a", "b", "choice", "labeller"),)
    extras: ClassVar[tuple[str, ...]] = ("seconds", "stages", "digests", "rewards", "time", "comment")
    judged: ClassVar[bool] = True

    @classmethod
    def doubt(cls, rows: Sequence[Mapping[str, Any]], kind: str, options: Mapping[str, Any]) -> UserError | None:
        """Rows none of which chooses between two replies are none of it, whatever their columns are called."""
        return None if any(row.get("choice") in CHOICES for row in rows) else UserError("no row has such a choice")

    def preferences(self, rows: Iterable[Row]) -> Found[Preference]:
        """The reply that most preferred over the other."""
        return self._settled(rows, self._preference)

    def unpaired(self, rows: Iterable[Row]) -> Found[Labelled]:
        """Both replies of every pair with a winner as a good and a bad one, and replies that are both bad."""
        return self._settled(rows, self._halves)

    def prompt(self, row: Row) -> Prompt:
        """What was asked."""
        said = row.data.get("prompt")
        if isinstance(said, str):  # as it was shown: never read as anything but one question
            return Prompt((Message("user", text_of(row, "prompt", said)),), row.id, meta_of(row))
        messages, tools = self.asked_of(row, "prompt")
        return Prompt(messages, row.id, meta_of(row), tools)

    def _settled(self, rows: Iterable[Row], record: Callable[[_Votes], Iterator[Any]]) -> Found[Any]:
        """What `record` makes of every pair, after bad rows; further votes on a pair are skipped by that name."""
        pairs: dict[tuple[Any, ...], _Votes] = {}
        counted: Found[Any] = each(lambda row: self._count(row, pairs), rows)
        yield from (problem for problem in counted if isinstance(problem, UserError))
        for votes in pairs.values():
            if {"a", "b"} <= set(votes.choices.values()):
                self.notes["pairs on which labellers contradict each other"] += 1
            yield from [Skip("further_vote")] * (votes.rows - 1)
            try:
                yield from record(votes)
            except UserError as problem:
                yield problem

    def _count(self, row: Row, pairs: dict[tuple[Any, ...], _Votes]) -> Skip:
        """Add a row's vote to those on its pair."""
        first, second, labeller = (text_of(row, field, row.data.get(field)) for field in ("a", "b", "labeller"))
        prompt, replies, choice = self.prompt(row), (first, second), row.data.get("choice")
        if choice not in CHOICES:
            got = short(str(choice))
            raise row.problem("choice", f"wrong value (got {got!r}; expected {', '.join(CHOICES)})")
        key = (tuple((m.role, m.content, str(m.calls)) for m in prompt.messages), *sorted(replies))
        votes = pairs.setdefault(key, _Votes(row, prompt, replies))
        swapped = replies != votes.replies
        votes.rows += 1
        votes.choices[labeller] = {"a": "b", "b": "a"}.get(choice, choice) if swapped else choice
        return Skip("counted")

    @staticmethod
    def _preference(votes: _Votes) -> Iterator[Any]:
        verdict = votes.verdict
        if verdict not in ("a", "b"):
            yield Skip({"tie": "tied", "bad": "both_bad"}.get(str(verdict), "no_majority"))
            return
        chosen, rejected = votes.replies if verdict == "a" else votes.replies[::-1]
        more: dict[str, Any] = {"meta": votes.prompt.meta, "tools": votes.prompt.tools}
        yield pair(votes.row, votes.prompt.messages, chosen, rejected, **more)

    def _halves(self, votes: _Votes) -> Iterator[Any]:
        if votes.verdict != "bad":
            for one in self._preference(votes):
                if isinstance(one, Skip):
                    yield one
                    return
                for suffix, reply, good in (("chosen", one.chosen, True), ("rejected", one.rejected, False)):
                    yield Labelled(one.prompt, reply, good, f"{one.id}#{suffix}", dict(one.meta), one.tools)
            return
        for suffix, reply in zip(("a", "b"), votes.replies, strict=True):
            name = f"{votes.row.id}#{suffix}"
            yield Labelled(votes.prompt.messages, reply, False, name, dict(votes.prompt.meta), votes.prompt.tools)
