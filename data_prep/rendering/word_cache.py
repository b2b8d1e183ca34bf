"""Token ids word by word, for tokenizers that never merge over a space: a word is encoded once, then remembered.

Natural text repeats its words, and looking one up takes a fifth of the time that encoding it takes. Which tokenizers
may be asked word by word is read off their pre-tokenizer, not tried: a wrong id would never be noticed.
"""

from __future__ import annotations

import json
import re
from typing import Any

_WORD = re.compile(r"\s*\S+(?:[^\S ]\s*\S*)*|\s+")
"""A text cut before every space that follows something else than white space."""
_MOST = 1 << 17  # words that are remembered
_LONG = 64  # characters of words that are

# A regular expression cuts a text as it cuts its words if no match goes on from something else into a space: if every
# alternative is white space only, or one sign of any sort and then none that is a space. Its last alternative, `\s+`,
# leaves no space to what lies between matches.
_CLASS = r"\\p\{[LMNPS][a-z]?\}"  # letters, marks, numbers, punctuation, symbols
_CHARACTER = r"(?:[a-zA-Z0-9]|[^\x00-\x7f])"
_MEMBER = rf"(?:{_CLASS}|\\[rn](?!-)|{_CHARACTER}(?:-{_CHARACTER})?|/)"
_NO_SPACE = rf"(?:{_CLASS}|\[\^\\s[^]\\]*(?:\\[^sS][^]\\]*)*\]|\[{_MEMBER}+\])(?:[+*?]|\{{\d+(?:,\d*)?\}})?"
_ENDING = r"(?:\(\?i:'[a-z]+(?:\|'[a-z]+)*\)\??|'[a-z]+)"  # 's, 't, 're
_ANY_SIGN = r"(?: |\[\^?(?:[^]\\[]|\\.|\\p\{\w+\})+\])\??"
_SPACES = r"\\s\+(?:\(\?!\\S\))?|\\s\*\[\\r\\n\]\+?"
_ALTERNATIVE = rf"(?:{_SPACES}|{_ENDING}|(?:{_ANY_SIGN})?(?:{_NO_SPACE})+(?:{_ENDING})?)"
_SAFE = re.compile(rf"{_ALTERNATIVE}(?:\|{_ALTERNATIVE})*")


class Words(dict[str, list[int]]):
    """Words -> their token ids, encoded when they are first asked for; it forgets all when it holds too many.

    Args:
        backend: a `tokenizers.Tokenizer` that is `apart`.
    """

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self._backend = backend

    def __missing__(self, word: str) -> list[int]:
        ids: list[int] = self._backend.encode(word, add_special_tokens=False).ids
        if len(word) <= _LONG:
            if len(self) >= _MOST:
                self.clear()
            self[word] = ids
        return ids

    def of(self, text: str) -> list[int]:
        """Token ids of a text."""
        whole: list[int] = []
        for ids in map(self.__getitem__, _WORD.findall(text)):
            whole += ids
        return whole

    def __reduce__(self) -> Any:
        return Words, (self._backend,)  # what it knows stays here


def apart(backend: Any) -> bool:
    """Whether a tokenizer gives a text the ids of its words, one after another.

    Args:
        backend: a `tokenizers.Tokenizer` that takes special tokens for plain text.
    """
    model = backend.model
    if type(model).__name__ != "BPE" or getattr(model, "dropout", None):
        return False
    added = backend.get_added_tokens_decoder().values()
    if any(not one.special and (one.lstrip or one.rstrip or one.single_word or " " in one.content) for one in added):
        return False
    if any(part["type"] != "NFC" for part in _parts(backend.normalizer, "normalizers")):
        return False
    splits = _parts(backend.pre_tokenizer, "pretokenizers")
    return all(map(_cuts_alike, splits)) and any(map(_cuts_spaces, splits))


def _parts(component: Any, several: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer, as tokenizer.json writes them."""
    if component is None:
        return []
    found = json.loads(component.__getstate__())
    return list(found[several]) if found["type"] == "Sequence" else [found]


def _cuts_alike(part: dict[str, Any]) -> bool:
    """Whether a step of a pre-tokenizer cuts a text as it cuts its words."""
    if part["type"] == "ByteLevel":
        return not bool(part["add_prefix_space"])
    if part["type"] == "Split":
        alike = bool(part["behavior"] == "Isolated" and not part["invert"])
        return alike and _SAFE.fullmatch(part["pattern"].get("Regex", "")) is not None
    return bool(part["type"] == "Digits")


def _cuts_spaces(part: dict[str, Any]) -> bool:
    """Whether a step begins a piece at every space behind something else."""
    if part["type"] == "ByteLevel":
        return bool(part["use_regex"])
    return bool(part["type"] == "Split" and part["pattern"].get("Regex", "").endswith(r"|\s+"))
