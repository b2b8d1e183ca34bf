"""Two dialogues that share everything but their last reply, split into prompt, chosen and rejected."""

from __future__ import annotations

from data_prep.sources import Row
from data_prep.types import Message


def shared_prompt(
    row: Row, chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], str, str]:
    """(prompt, chosen reply, rejected reply) of two dialogues that end in an assistant turn.

    Raises:
        UserError: a side does not end in an assistant turn, or they differ before it.
    """
    for field, side in (("chosen", chosen), ("rejected", rejected)):
        if side[-1].role != "assistant":
            raise row.problem(field, f"ends in a {side[-1].role} turn (expected an assistant turn)")
    if chosen[:-1] != rejected[:-1]:
        raise row.problem("rejected", "differs from chosen before the last reply (expected the same prompt)")
    if len(chosen) == 1:
        raise row.problem("chosen", "has no prompt before the reply")
    return chosen[:-1], chosen[-1].content, rejected[-1].content
