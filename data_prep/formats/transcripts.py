"""Dialogues as one text, turns after "\\n\\nHuman:" and "\\n\\nAssistant:" (Bai et al. 2022, arXiv 2204.05862)."""

from __future__ import annotations

import re

from data_prep.types import Message

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_SYSTEM = re.compile(r"\s*System:(.*)", re.DOTALL)
_ROLES = {"Human": "user", "Assistant": "assistant"}


def turns_of(text: str) -> tuple[tuple[Message, ...], str]:
    """(its turns, what stands before them); a text that starts with "System:" begins with that message."""
    before, *rest = _TURN.split(text)
    system = _SYSTEM.fullmatch(before)
    front = (Message("system", system[1].strip()),) if system and rest and system[1].strip() else ()
    turns = tuple(Message(_ROLES[who], said.strip()) for who, said in zip(rest[::2], rest[1::2], strict=True))
    return front + turns, "" if front else before


def open_transcript(text: str) -> tuple[Message, ...] | None:
    """The turns of a text that asks for the next one, "Human: ... Assistant:"; None for any other text."""
    if not text.rstrip().endswith("Assistant:"):
        return None
    turns, before = turns_of(text.rstrip())
    asked = turns[:-1]
    whole = len(asked) > 0 and asked[-1].role == "user" and all(turn.content for turn in asked)
    return asked if whole and not before.strip() and not turns[-1].content else None
