"""The shape of one small-talk topic; the content itself is in the sibling ``smalltalk_topics_*`` files."""

from __future__ import annotations

from typing import NamedTuple


class Topic(NamedTuple):
    """One topic of the small-talk data set.

    ask: core phrasings. ``{a|b|}`` is a slot of alternatives (the last one here is empty); a leading ``*``
        marks a request, which may take "please". The final mark (``? . !``) is part of the phrasing.
    words: key words of the topic; every answer contains at least one of them.
    facts: sentences about the topic for the stories of the pretraining text.
    social: a greeting, thanks or the like, which takes other openers than a question.
    """

    name: str
    about: str
    words: tuple[str, ...]
    facts: tuple[str, ...]
    ask: tuple[str, ...]
    plain: str
    cheerful: str
    pirate: str
    social: bool = False
