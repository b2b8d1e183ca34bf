"""What the turns of a dialogue must be: something to reply to, a reply, two replies to one prompt."""

from __future__ import annotations

from data_prep.sources.rows import Row
from data_prep.types import Message


def need_reply(row: Row, field: str, messages: tuple[Message, ...]) -> None:
    """Refuse a conversation without a supervised assistant turn.

    Raises:
        UserError: there is none.
    """
    if not any(message.role == "assistant" for message in messages):
        raise row.problem(field, "nothing to train on (got no assistant turn; expected one)", code="no_reply")
    if not any(message.role == "assistant" and message.trained for message in messages):
        raise row.problem(
            field,
            "nothing to train on (got none but train: false; expected an assistant turn without train: false)",
            code="no_reply",
        )


def need_question(row: Row, field: str, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages, if there is something to reply to.

    Raises:
        UserError: there are none, or the last is the assistant's.
    """
    if not messages or messages[-1].role in ("assistant", "system"):
        last = f"a turn of the {messages[-1].role}" if messages else "no message"
        raise row.problem(field, f"nothing to reply to (got {last} at the end; expected a user turn)")
    return messages


def reply_of(row: Row, field: str, messages: tuple[Message, ...]) -> str:
    """The text of the last turn, which must be the assistant's.

    Raises:
        UserError: it is not, or it calls tools.
    """
    if not messages or messages[-1].role != "assistant":
        last = messages[-1].role if messages else "no"
        raise row.problem(field, f"ends in a {last} turn (got {last}; expected an assistant turn)", code="no_reply")
    if messages[-1].calls:
        raise row.problem(
            field, "ends in a tool call (got no words; expected a reply; options.tools=text writes calls out)"
        )
    return messages[-1].content


def shared_prompt(
    row: Row, chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], str, str]:
    """(prompt, chosen reply, rejected reply) of two dialogues that end in an assistant turn.

    Raises:
        UserError: a side does not end in an assistant turn, or they differ before it.
    """
    replies = [reply_of(row, field, side) for field, side in (("chosen", chosen), ("rejected", rejected))]
    if chosen[:-1] != rejected[:-1]:
        raise row.problem(
            "rejected",
            "differs from chosen before the last reply (got another prompt; expected the same)",
            code="other_prompt",
        )
    if len(chosen) == 1:
        raise row.problem("chosen", "has no prompt before the reply (got the reply alone; expected a user turn)")
    return need_question(row, "chosen", chosen[:-1]), replies[0], replies[1]
