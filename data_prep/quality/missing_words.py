"""Replies that say no more than what tables write where something is missing: `nan`, `None`, `null`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from data_prep.types import Conversation, Labelled, Preference

_NO_ANSWERS, _WORDS = ("nan", "<na>"), ("nan", "<na>", "none", "null")
"""Words that nobody answers with, and those that somebody may."""


def note_missing(record: Any, notes: Counter[str]) -> None:
    """Count a record under the word that is all its last reply says."""
    replies: tuple[str, ...] = ()
    if isinstance(record, Conversation):
        replies = (record.messages[-1].content,)
    elif isinstance(record, Preference):
        replies = (record.chosen, record.rejected)
    elif isinstance(record, Labelled):
        replies = (record.reply,)
    for reply in replies:
        if len(reply) < 9 and (word := reply.strip().lower()) in _WORDS:
            notes[_note(word)] += 1


def missing_replies(notes: Mapping[str, int]) -> dict[str, int]:
    """Word that nobody answers with -> replies that say no more, by the notes of a source."""
    return {word: notes[_note(word)] for word in _NO_ANSWERS if notes.get(_note(word))}


def _note(word: str) -> str:
    return f"replies that say no more than '{word}', as tables write what is missing"
