"""From data options to token ids: sources -> formats -> filters -> rendering -> sides -> mixture, with a data card.

Records stream: none is held longer than its chunk takes to render. Every row that goes in comes out kept or dropped for
a named reason; the sum is asserted. Rendering is Renderer's.
"""

from __future__ import annotations

from typing import Any

from data_prep.contents import data_digest
from data_prep.digests import template_digest, tokenizer_digest
from data_prep.formats.base import CONVERSATION, DOCUMENT, PREFERENCE, PROMPT, UNPAIRED
from data_prep.options import DataOptions, LengthOptions
from data_prep.prepared import Prepared
from data_prep.reading import source_rows
from data_prep.rendering import Renderer
from data_prep.types import LabelledTokens, PairTokens, PromptTokens, Tokens

__all__ = [
    "Prepared",
    "Renderer",
    "data_digest",
    "prepare_conversations",
    "prepare_preferences",
    "prepare_prompts",
    "prepare_text",
    "prepare_unpaired",
    "source_rows",
    "template_digest",
    "tokenizer_digest",
]


def prepare_conversations(data: DataOptions, renderer: Renderer, length: LengthOptions, seed: int) -> Prepared[Tokens]:
    """Conversations as ids with a mask of the assistant's words.

    Raises:
        UserError: bad rows, too many over-long rows, or nothing left.
    """
    return _prepared(data, CONVERSATION, renderer, length, seed)


def prepare_preferences(
    data: DataOptions, renderer: Renderer, length: LengthOptions, seed: int
) -> Prepared[PairTokens]:
    """Preferences as prompt ids and two replies; the longer of both sides counts for `max_length`.

    Raises:
        UserError: bad rows (identical sides too), too many over-long rows, or nothing left.
    """
    return _prepared(data, PREFERENCE, renderer, length, seed)


def prepare_unpaired(
    data: DataOptions, renderer: Renderer, length: LengthOptions, seed: int
) -> Prepared[LabelledTokens]:
    """Labelled replies (of `data.preferences`) as prompt ids and reply ids.

    Raises:
        UserError: bad rows, too many over-long rows, or nothing left.
    """
    return _prepared(data, UNPAIRED, renderer, length, seed)


def prepare_prompts(data: DataOptions, renderer: Renderer, length: LengthOptions, seed: int) -> Prepared[PromptTokens]:
    """Prompts with the generation prompt; repeated ones are dropped and counted.

    Falls back on the prompts of the conversations, then of the preferences, when no prompts are given.

    Raises:
        UserError: bad rows, too many over-long rows, or nothing left.
    """
    return _prepared(data, PROMPT, renderer, length, seed)


def prepare_text(data: DataOptions, renderer: Renderer, length: LengthOptions, seed: int) -> Prepared[Tokens]:
    """Documents as ids, every token supervised; documents longer than `max_length` are cut into pieces, counted.

    Raises:
        UserError: bad rows or nothing left.
    """
    return _prepared(data, DOCUMENT, renderer, length, seed)


def _prepared(data: DataOptions, kind: str, renderer: Renderer, length: LengthOptions, seed: int) -> Prepared[Any]:
    from data_prep.preparing import Preparation  # numpy: `align check` of a configuration alone does without

    return Preparation(data, kind, renderer, length, seed).run()
