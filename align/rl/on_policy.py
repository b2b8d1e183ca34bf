"""Pairs made of what a policy says now: of its replies to a prompt, those that a judge calls worse are rejected.

    chosen     the best of the known reply and the policy's whole replies, by the judge; in a tie the known one
    rejected   every other reply of the policy with a lower score, each once

"Training a Helpful and Harmless Assistant with Reinforcement Learning from Human Feedback", arXiv 2204.05862, section
4.5, has people judge the replies of the newest policy; here a signal does (`align/rl/signals/`). The known reply is the
chosen one of a pair that the data gives for the very same prompt. A reply that did not end is never chosen. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.records.negatives import KINDS
from data_prep.types import PairTokens, PromptTokens, features_of

KIND = "on_policy"
"""What these pairs are called among the kinds of pairs."""


@dataclass(frozen=True)
class Candidate:
    """A reply to a prompt, with what the judge says of it."""

    ids: tuple[int, ...]
    text: str
    finished: bool
    score: float
    known: bool = False
    """Whether the data has it, and not the policy."""


@dataclass(frozen=True)
class OnPolicyPair:
    """A pair of replies to a prompt, and where it comes from."""

    row: PromptTokens
    chosen: Candidate
    rejected: Candidate

    def tokens(self) -> PairTokens:
        """The pair as it is trained on."""
        sides = (list(self.row.ids), list(self.chosen.ids), list(self.rejected.ids))
        return PairTokens(*sides, id=self.row.id, task=KIND, features=features_of(self.row.ids))

    def as_row(self, **more: Any) -> dict[str, Any]:
        """A row that says what was compared, and how; the format `pairs` reads it."""
        return {
            "prompt": list(self.row.messages),
            "chosen": self.chosen.text,
            "rejected": self.rejected.text,
            "id": self.row.id,
            "chosen_from": "data" if self.chosen.known else "policy",
            "scores": {"chosen": self.chosen.score, "rejected": self.rejected.score},
            **more,
            "tokens": dict(vars(self.tokens())),
        }


def pairs_of(row: PromptTokens, candidates: Sequence[Candidate]) -> Iterator[OnPolicyPair]:
    """The pairs that the replies to one prompt give."""
    whole = [one for one in candidates if one.finished]
    if not whole:
        return
    best = max(whole, key=lambda one: (one.score, one.known))
    worse = {one.ids: one for one in candidates if not one.known and one.score < best.score}
    for one in worse.values():
        yield OnPolicyPair(row, best, one)


def known_replies(pairs: Iterable[PairTokens], prompts: Sequence[PromptTokens]) -> list[list[int] | None]:
    """Of each prompt the chosen reply that the data gives for it, if there is one; of several pairs the first one's."""
    wanted = {tuple(row.ids) for row in prompts}
    found: dict[tuple[int, ...], list[int]] = {}
    for pair in pairs:
        prompt = tuple(pair.prompt)
        if prompt in wanted and pair.task not in KINDS:
            found.setdefault(prompt, list(pair.chosen))
    return [found.get(tuple(row.ids)) for row in prompts]
