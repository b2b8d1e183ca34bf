"""Near duplicates: MinHash finds candidates, their word pairs decide.

Two texts are compared by their word pairs (each counted as often as it stands there): the similarity is the Jaccard
index, pairs in both over pairs in either. Candidates come from MinHash signatures in bands (Broder 1997, "On the
resemblance and containment of documents"; banding as in Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets",
section 3.4); a candidate counts only when the Jaccard index of its word pairs, not an estimate of it, reaches the
threshold. What the bands miss at the threshold itself is under 1 in 500, and less above it. Own code rather than
datasketch, which took twice the time for the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.quality.text_keys import words

Hashes = npt.NDArray[np.uint64]
NEAR = 0.7
"""The default threshold: one word changed in a text of 13 words or more."""
_HASHES = 128
_MISSED = 0.002
_BLOCK = 4096
_random = np.random.Generator(np.random.PCG64(20261121))
_A: Hashes = _random.integers(0, 1 << 63, size=_HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_B: Hashes = _random.integers(0, 1 << 63, size=_HASHES, dtype=np.uint64)
_LEFT, _RIGHT, _TIMES = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0xD6E8FEB86659FD93)
_LETTER, _SIGN = 1, 2


def _tables() -> tuple[bytes, Hashes, Hashes]:
    """What each byte is (0: white space), what it counts in a hash (the same for a capital), and the powers."""
    signs = [chr(byte) for byte in range(128)]
    kinds = [0 if sign.isspace() else _LETTER if sign.isalnum() else _SIGN for sign in signs] + [_LETTER] * 128
    values = _random.integers(1, 1 << 63, size=256, dtype=np.uint64)
    values[[ord(sign) for sign in signs if sign.isupper()]] = values[[ord(s.lower()) for s in signs if s.isupper()]]
    values[np.array(kinds) == 0] = 0
    return bytes(kinds), values, np.cumprod(np.full(1 << 12, _LEFT, dtype=np.uint64), dtype=np.uint64)


_KINDS, _BYTES, _POWERS = _tables()


def word_hashes(texts: Sequence[str]) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """64-bit hashes of the words (see `texts.words`) of all texts, the same in every process, and how many each has.

    A word's hash is a polynomial of its UTF-8 bytes, mixed; bytes beyond ASCII count as letters here, as `words` has
    taken such texts apart.
    """
    apart = [text if text.isascii() else " ".join(words(text)) for text in texts]
    encoded = [text.encode("utf-8", "surrogatepass") for text in apart]
    joined = b"\n".join([*encoded, b""])
    data, kinds = np.frombuffer(joined, dtype=np.uint8), np.frombuffer(joined.translate(_KINDS), dtype=np.uint8)
    begins = kinds == _SIGN
    begins |= (kinds == _LETTER) & (np.roll(kinds, 1) != _LETTER)  # the last is white space
    places = np.flatnonzero(begins)
    ends = np.cumsum([0, *(len(one) + 1 for one in encoded)])
    counts = np.diff(np.searchsorted(places, ends))
    if not len(places):
        return np.zeros(0, dtype=np.uint64), counts
    data, places = data[places[0] :], places - places[0]
    inside = np.arange(len(data)) - np.repeat(places, np.diff(places, append=len(data)))
    hashed = np.add.reduceat(_BYTES[data] * _POWERS[inside & (len(_POWERS) - 1)], places)
    hashed = (hashed ^ (hashed >> np.uint64(32))) * _TIMES
    return hashed ^ (hashed >> np.uint64(29)), counts


def word_pairs(text: str) -> Hashes:
    """Sorted 64-bit hashes of the word pairs of a text, all different: the n-th of equal pairs has its own hash.

    A text of one word gives one hash, an empty one none.
    """
    hashed, _ = word_hashes([text])
    pairs = hashed[:-1] * _LEFT + hashed[1:] * _RIGHT if len(hashed) > 1 else hashed
    pairs.sort()
    again = pairs[1:] == pairs[:-1]
    if not again.any():
        return pairs
    places = np.arange(1, len(pairs))
    first = np.maximum.accumulate(np.where(again, 0, places))  # where each run of equal pairs begins
    repeated = np.zeros(len(pairs), dtype=np.uint64)
    repeated[1:] = places - first
    return np.sort(pairs + repeated * _TIMES)


def pairs_of_hashes(hashed: Hashes, lengths: npt.NDArray[np.int64]) -> tuple[Hashes, npt.NDArray[np.uint32]]:
    """`word_pairs` of many texts at once, in the order of the words: (those of all, how many each has).

    The n-th of equal pairs has its own hash here too, counted from the front: the first pairs of a text are those of
    its beginning.

    Args:
        hashed: of all words, `lengths` of each text: `word_hashes` of the texts.
    """
    ends = np.cumsum(lengths)
    last, alone = np.zeros(len(hashed), dtype=bool), np.zeros(len(hashed), dtype=bool)
    last[ends[lengths > 1] - 1] = True  # words that begin no pair
    alone[ends[lengths == 1] - 1] = True
    pairs = np.where(alone, hashed, hashed * _LEFT + np.roll(hashed, -1) * _RIGHT)[~last]
    counts = np.where(lengths > 1, lengths - 1, lengths)
    ends = np.cumsum(counts)
    for start, end in zip((ends - counts).tolist(), ends.tolist(), strict=True):
        own = pairs[start:end]
        ordered = np.sort(own)
        if (ordered[1:] == ordered[:-1]).any():
            own += _repetitions(own) * _TIMES
    return pairs, counts.astype(np.uint32)


def _repetitions(pairs: Hashes) -> Hashes:
    """How often each pair stood there before."""
    order = np.argsort(pairs, kind="stable")
    ordered, places = pairs[order], np.arange(len(pairs))
    first = np.maximum.accumulate(np.where(np.r_[True, ordered[1:] != ordered[:-1]], places, 0))
    found = np.empty(len(pairs), dtype=np.uint64)
    found[order] = places - first
    return found


def similarity(left: Hashes, right: Hashes) -> float:
    """The Jaccard index of two outputs of `word_pairs`, 0 to 1; 0 for two empty ones."""
    common = len(np.intersect1d(left, right, assume_unique=True))
    either = len(left) + len(right) - common
    return common / either if either else 0.0


def signature(pairs: Hashes) -> npt.NDArray[np.uint32]:
    """The MinHash signature of word pairs, [128] uint32: two agree in a place with the probability of their Jaccard."""
    least: Hashes = np.full(_HASHES, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(pairs), _BLOCK):
        block = pairs[None, start : start + _BLOCK] * _A[:, None] + _B[:, None]
        np.minimum(least, block.min(axis=1), out=least)
    marks: npt.NDArray[np.uint32] = (least >> np.uint64(32)).astype(np.uint32)
    return marks


def band_rows(threshold: float) -> int:
    """Hashes per band: as many as leave under 1 in 500 pairs of exactly this similarity without a common band."""
    fitting = [r for r in range(1, 33) if (1 - threshold**r) ** (_HASHES // r) <= _MISSED]
    return max(fitting, default=1)


class NearIndex:
    """Texts seen so far, asked for one that is nearly the same. Memory: about 1 kB and 8 bytes a word for each.

    Args:
        threshold: least Jaccard index of word pairs, above 0 and at most 1.
    """

    def __init__(self, threshold: float = NEAR) -> None:
        self.threshold = threshold
        self._rows = band_rows(threshold)
        self._bands = _HASHES // self._rows
        self._buckets: list[dict[bytes, list[int]]] = [{} for _ in range(self._bands)]
        self._pairs: list[Hashes] = []
        self._names: list[Any] = []
        self._signatures = np.empty((64, _HASHES), dtype=np.uint32)

    def __len__(self) -> int:
        """How many texts it holds."""
        return len(self._names)

    def find(self, pairs: Hashes) -> Any | None:
        """The name of the first text held that is nearly the same, or None."""
        return next(self.similar(pairs), None)

    def similar(self, pairs: Hashes) -> Iterator[Any]:
        """The names of all texts held that are nearly the same, oldest first."""
        if len(pairs) and self._names:
            yield from self._similar(pairs, signature(pairs))

    def add(self, pairs: Hashes, name: Any) -> None:
        """Hold a text."""
        if len(pairs):
            self._hold(pairs, name, signature(pairs))

    def find_or_add(self, pairs: Hashes, name: Any) -> Any | None:
        """The name of the first text held that is nearly the same; where there is none, this one is held."""
        if not len(pairs):
            return None
        marks = signature(pairs)
        found = next(self._similar(pairs, marks), None)
        if found is None:
            self._hold(pairs, name, marks)
        return found

    def _similar(self, pairs: Hashes, marks: npt.NDArray[np.uint32]) -> Iterator[Any]:
        candidates: set[int] = set()
        for bucket, key in zip(self._buckets, self._keys(marks), strict=True):
            candidates.update(bucket.get(key, ()))
        if not candidates:
            return
        places = np.fromiter(candidates, dtype=np.int64, count=len(candidates))
        agree = (self._signatures[places] == marks).mean(axis=1)
        for place in sorted(places[agree >= self.threshold - 0.15].tolist()):  # 0.15: four standard errors
            if similarity(self._pairs[place], pairs) >= self.threshold:
                yield self._names[place]

    def _hold(self, pairs: Hashes, name: Any, marks: npt.NDArray[np.uint32]) -> None:
        place = len(self._names)
        if place == len(self._signatures):
            self._signatures = np.concatenate([self._signatures, np.empty_like(self._signatures)])
        self._signatures[place] = marks
        self._pairs.append(pairs)
        self._names.append(name)
        for bucket, key in zip(self._buckets, self._keys(marks), strict=True):
            bucket.setdefault(key, []).append(place)

    def _keys(self, marks: npt.NDArray[np.uint32]) -> list[bytes]:
        flat, width = marks.tobytes(), 4 * self._rows
        return [flat[width * band : width * (band + 1)] for band in range(self._bands)]
