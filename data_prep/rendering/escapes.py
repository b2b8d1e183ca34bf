"""Control strings in contents, replaced by private-use sequences before a template sees them, and put back after."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_OPEN, _CLOSE = "\uf8f4", "\uf8f5"
_MARKED = re.compile(_OPEN + r"(\d+)" + _CLOSE)


class Escapes:
    """Replaces control strings inside contents by private-use sequences, and back."""

    def __init__(self, controls: Iterable[str]) -> None:
        self._strings = [*sorted(set(controls), key=lambda text: (-len(text), text)), _OPEN, _CLOSE]
        self._index = {text: number for number, text in enumerate(self._strings)}
        self._pattern = re.compile("|".join(re.escape(text) for text in self._strings))
        self._first = {text[0] for text in self._strings}

    def escape(self, content: str) -> str:
        """`content` without any control string."""
        if not any(sign in content for sign in self._first):  # most contents, and a tenth of the time
            return content
        return self._pattern.sub(lambda found: f"{_OPEN}{self._index[found[0]]}{_CLOSE}", content)

    def escape_all(self, value: Any) -> Any:
        """JSON-able `value` with every text in it escaped, keys too."""
        if isinstance(value, str):
            return self.escape(value)
        if isinstance(value, Mapping):
            return {self.escape(str(key)): self.escape_all(item) for key, item in value.items()}
        return [self.escape_all(item) for item in value] if isinstance(value, (list, tuple)) else value

    def string(self, number: int) -> str:
        """The control string of this number."""
        return self._strings[number]

    def spelled(self, content: str) -> set[str]:
        """The control strings that a content spells."""
        if not any(sign in content for sign in self._first):
            return set()
        return {found[0] for found in self._pattern.finditer(content)} - {_OPEN, _CLOSE}

    def marks_of(self, strings: Iterable[str]) -> re.Pattern[str]:
        """What stands for these strings in escaped text: one group, the number of the string."""
        numbers = "|".join(str(self._index[text]) for text in strings)
        return re.compile(f"{_OPEN}({numbers}){_CLOSE}")

    def unescape(self, text: str) -> str:
        """The original text; halves of a sequence that a template tore apart vanish."""
        if _OPEN not in text and _CLOSE not in text:
            return text
        pieces = _MARKED.split(text)
        for place, piece in enumerate(pieces):
            if place % 2:
                pieces[place] = self._strings[int(piece)]
            else:
                pieces[place] = piece.replace(_OPEN, "").replace(_CLOSE, "")
        return "".join(pieces)
