"""Plain text to token ids, never to control ids, and the same wherever a text stands alone or goes on.

Special tokens are not parsed (`split_special_tokens`). Tokenizers that put a space before the first word
(SentencePiece style) are encoded behind an anchor character where the text does not begin a document.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from data_prep.core.errors import UserError

_ANCHORS = ("\n", ":", "x", "0", "|")
_PROBES = ("x", "hello", "7")
START, CONTROL, JOIN = "start", "control", "join"
_BATCH = 64  # texts per call of the tokenizer: half the time per text of calls with thousands
Section = tuple[str, str]


class PlainEncoder:
    """Encodes sections of plain text in batches.

    Args:
        tokenizer: a transformers tokenizer.
        controls: control string -> id; none of these ids ever comes out.
    """

    def __init__(self, tokenizer: Any, controls: dict[str, int]) -> None:
        self._tokenizer = tokenizer
        self._controls = controls
        self._forbidden = set(controls.values()) - {tokenizer.unk_token_id}
        longest_first = sorted(controls, key=lambda text: (-len(text), text))
        self._pattern = re.compile("|".join(re.escape(text) for text in longest_first) or r"(?!)")
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backend: Any = backend if hasattr(backend, "encode_batch_fast") else None
        self._anchors = [(anchor, self._raw([anchor])[0]) for anchor in _ANCHORS]
        alone = self._raw(list(_PROBES))
        self._prefixes = alone != [self._behind_anchor([probe])[0] for probe in _PROBES]
        self._control_is_start = self._prefixes and self._starts_after_control(alone[0])

    def _raw(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, special tokens not parsed and none added."""
        if not texts:
            return []
        backend = self._backend
        if backend is None:
            encoded = self._tokenizer(
                list(texts),
                add_special_tokens=False,
                split_special_tokens=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            return [list(ids) for ids in encoded["input_ids"]]
        backend.no_truncation()
        backend.no_padding()
        before, backend.encode_special_tokens = backend.encode_special_tokens, True
        try:
            starts = range(0, len(texts), _BATCH)
            calls = (backend.encode_batch_fast(texts[i : i + _BATCH], add_special_tokens=False) for i in starts)
            return [found.ids for call in calls for found in call]
        finally:
            backend.encode_special_tokens = before

    def _starts_after_control(self, alone: list[int]) -> bool:
        for text in self._controls:
            ids = self._tokenizer(text + _PROBES[0], add_special_tokens=False, verbose=False)["input_ids"]
            if ids and ids[0] == self._controls[text]:
                return bool(list(ids[1:]) == alone)
        return False

    def _behind_anchor(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that go on after other text: encoded behind an anchor, which is cut off again.

        An anchor that merges with the text is passed over for the next; if all merge, the text stands alone.
        """
        result: dict[int, list[int]] = {}
        for anchor, own in self._anchors:
            left = [place for place in range(len(texts)) if place not in result]
            for place, ids in zip(left, self._raw([anchor + texts[place] for place in left]), strict=True):
                if own and ids[: len(own)] == own:
                    result[place] = ids[len(own) :]
        left = [place for place in range(len(texts)) if place not in result]
        result.update(zip(left, self._raw([texts[place] for place in left]), strict=True))
        return [result[place] for place in range(len(texts))]

    def encode(self, sections: Sequence[Section]) -> dict[Section, list[int]]:
        """Ids of each distinct (mode, text); mode says what stands before: START, CONTROL or JOIN.

        Raises:
            UserError: the tokenizer makes a control token even from pieces of its name.
        """
        distinct = list(dict.fromkeys(sections))
        joined = [section for section in distinct if self._goes_on(section[0])]
        alone = [section for section in distinct if not self._goes_on(section[0])]
        ids = dict(zip(joined, self._behind_anchor([text for _, text in joined]), strict=True))
        ids.update(zip(alone, self._raw([text for _, text in alone]), strict=True))
        for section, found in ids.items():
            if not self._forbidden.isdisjoint(found):
                ids[section] = self._encode_torn(section)
        return ids

    def _goes_on(self, mode: str) -> bool:
        if not self._prefixes or mode == START:
            return False
        return mode == JOIN or not self._control_is_start

    def _encode_torn(self, section: Section) -> list[int]:
        """Ids of a text whose control strings are torn after their first character."""
        mode, text = section
        cuts = [0, *(found.start() + 1 for found in self._pattern.finditer(text)), len(text)]
        parts = [text[a:b] for a, b in pairwise(cuts) if b > a]
        head = self._behind_anchor(parts[:1]) if self._goes_on(mode) else self._raw(parts[:1])
        rest = self._behind_anchor(parts[1:]) if self._prefixes else self._raw(parts[1:])
        ids = [token for part in head + rest for token in part]
        if not self._forbidden.isdisjoint(ids):
            raise UserError("the tokenizer makes a control token from plain text of this row", code="control_token")
        return ids
