"""What preference pairs teach besides quality: length, contradictions, ties."""

from __future__ import annotations

from typing import Any

from data_prep.quality.text_keys import digest, folded, turns_text
from data_prep.types import Preference


def direction(pair: Preference) -> tuple[bytes, bool]:
    """(what is compared, equal for both directions; whether the first side in a fixed order is chosen)."""
    chosen, rejected = folded(pair.chosen), folded(pair.rejected)
    low, high = sorted((chosen, rejected))
    return digest(turns_text(pair.prompt), low, high), chosen == low


class PairNumbers:
    """Numbers of preference pairs, collected one by one."""

    def __init__(self) -> None:
        self._count = self._longer = self._shorter = self._tied = 0
        self._chars = [0, 0]
        self._directions: dict[bytes, list[int]] = {}
        self._answers: dict[bytes, list[int]] = {}

    def add(self, pair: Preference) -> None:
        """Count one pair."""
        chosen, rejected = len(pair.chosen), len(pair.rejected)
        self._count += 1
        self._longer += chosen > rejected
        self._shorter += chosen < rejected
        self._tied += pair.margin == 0
        self._chars[0] += chosen
        self._chars[1] += rejected
        compared, first = direction(pair)
        self._directions.setdefault(compared, [0, 0])[first] += 1
        answers = digest(*sorted((folded(pair.chosen), folded(pair.rejected))))
        self._answers.setdefault(answers, [0, 0])[first] += 1

    def card(self) -> dict[str, Any]:
        """The numbers, {} for no pair.

        `contradictory`: rows whose prompt and replies also stand there the other way round. `tied`: rows with margin 0.
        `chosen_longer` and `chosen_shorter`: shares of rows; a reward model that only counts characters would be right
        in `chosen_longer` of them. `both_orders`: `pairs` of two answers, `of` so many, that are preferred one way
        and the other under different prompts, in so many `rows`, of which `against` go against the usual order.
        `chosen_chars` and `rejected_chars`: mean lengths.
        """
        if not self._count:
            return {}
        return {
            "contradictory": sum(sum(both) for both in self._directions.values() if all(both)),
            "tied": self._tied,
            "both_orders": {
                "pairs": sum(all(both) for both in self._answers.values()),
                "of": len(self._answers),
                "rows": sum(sum(both) for both in self._answers.values() if all(both)),
                "against": sum(min(both) for both in self._answers.values()),
            },
            "chosen_longer": round(self._longer / self._count, 4),
            "chosen_shorter": round(self._shorter / self._count, 4),
            "chosen_chars": round(self._chars[0] / self._count, 1),
            "rejected_chars": round(self._chars[1] / self._count, 1),
        }
