"""language: keeps rows in the languages asked for, as far as the language can be told.

The guess is py3langid's (Lui and Baldwin 2012, "langid.py"; 97 languages, the model comes with the package), on the
whole row. Below `least` confidence, which is where texts of a few words, numbers and code fall, a row stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from data_prep.core.errors import UserError, nearest
from data_prep.core.options import option
from data_prep.quality.text_keys import whole_text
from data_prep.records.filter import FILTERS, Filter
from data_prep.sources.rows import Skip

LEAST = 0.8
LONGEST = 4000
"""Characters that are looked at; more do not change the guess."""


@lru_cache(maxsize=1)
def identifier() -> Any:
    """py3langid's identifier with confidences from 0 to 1.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as problem:
        raise UserError(
            "the language of rows needs the package py3langid", code="missing_package", hint="pip install py3langid"
        ) from problem
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language_of(text: str) -> tuple[str, float]:
    """(ISO 639-1 code, confidence 0 to 1) of a text."""
    code, confidence = identifier().classify(text[:LONGEST])
    return str(code), float(confidence)


@FILTERS.register("language")
@dataclass
class Language(Filter):
    """Keeps rows in the languages asked for."""

    keep: list[str] = option(None, "ISO 639-1 codes of the languages that stay: [en, de]")
    least: float = option(LEAST, "confidence from which another language is believed", high=1.0)

    def __post_init__(self) -> None:
        self.keep = list(self.keep or ())
        if not self.keep:
            raise ValueError("keep needs at least one language, such as [en]")

    def begin(self, root: str | None) -> None:
        """Check the languages' names."""
        known = identifier().labels
        for code in self.keep:
            if code not in known:
                near = nearest(code, known)
                raise UserError(
                    f"unknown language '{code}' ({f'did you mean {near!r}? ' if near else ''}expected ISO 639-1 codes)",
                    field="data.filters.language.keep",
                    code="unknown_language",
                )

    def step(self, record: Any) -> Any:
        """The record, or Skip("language")."""
        code, confidence = language_of(whole_text(record))
        if code in self.keep:
            return record
        if confidence < self.least:
            self.notes["language not certain, kept"] += 1
            return record
        return Skip("language")
