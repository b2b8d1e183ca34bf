"""Statistics that say how good a reward model or a policy is, each with its uncertainty (stdlib only).

Sources: Wilson 1927 (score interval); Guo et al. 2017 (arXiv 1706.04599, eq. 3, expected calibration error);
Spearman 1904 (rank correlation, ties get their mean rank).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Z95 = 1.959963984540054  # two-sided 95 % point of the normal distribution


def accuracy_interval(correct: float, n: int) -> tuple[float, float, float]:
    """Share `correct / n` and its 95 % Wilson interval: (value, low, high), all in 0..1.

    correct may be fractional (a tie counts half). ValueError unless ``0 <= correct <= n`` and ``n >= 1``.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"a share needs 0 <= correct <= n and n >= 1, not {correct} of {n}")
    share, shrink = correct / n, 1 + Z95**2 / n
    centre = (share + Z95**2 / (2 * n)) / shrink
    half = Z95 / shrink * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def calibration_bins(margins: Sequence[float], bins: int = 10) -> list[dict[str, float]]:
    """How often pairs are ordered rightly, by the confidence with which (chosen score - rejected score).

    ``p = sigmoid(margin)`` is the model's probability that the chosen reply is preferred. Which reply
    stands first is arbitrary, so this is made symmetric: a pair's confidence is ``max(p, 1 - p)`` and it is
    correct when the margin is positive (a margin of 0 is half correct). Confidences fall into `bins` equal
    bins over 0.5..1. Returns the bins that hold a pair, rising: {from, to, n, confidence, accuracy}, the
    last two means over the bin's pairs.
    ValueError when there are no margins or no bins.
    """
    if not margins or bins < 1:
        raise ValueError("calibration needs at least one margin and one bin")
    held: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for margin in margins:
        confidence = 1 / (1 + math.exp(-min(abs(margin), 700.0)))
        correct = 0.5 if margin == 0 else float(margin > 0)
        held[min(int((confidence - 0.5) * 2 * bins), bins - 1)].append((confidence, correct))
    return [
        {
            "from": 0.5 + 0.5 * place / bins,
            "to": 0.5 + 0.5 * (place + 1) / bins,
            "n": len(pairs),
            "confidence": math.fsum(confidence for confidence, _ in pairs) / len(pairs),
            "accuracy": math.fsum(correct for _, correct in pairs) / len(pairs),
        }
        for place, pairs in enumerate(held)
        if pairs
    ]


def calibration_error(bins: Sequence[Mapping[str, float]]) -> float:
    """Expected calibration error in 0..1: mean over pairs of their bin's |accuracy - confidence|."""
    return sum(held["n"] * abs(held["accuracy"] - held["confidence"]) for held in bins) / sum(b["n"] for b in bins)


def length_correlation(scores: Sequence[float], lengths: Sequence[float]) -> float:
    """Spearman's rank correlation in -1..1 of scores with reply lengths; 0.0 where either is constant.

    ValueError when the two differ in length or are empty.
    """
    if len(scores) != len(lengths) or not scores:
        raise ValueError(f"one length per score needed, not {len(lengths)} for {len(scores)}")
    ranks_a, ranks_b = _ranks(scores), _ranks(lengths)
    middle = (len(scores) + 1) / 2
    cross = sum((a - middle) * (b - middle) for a, b in zip(ranks_a, ranks_b, strict=True))
    spread = math.prod(math.sqrt(sum((rank - middle) ** 2 for rank in ranks)) for ranks in (ranks_a, ranks_b))
    return cross / spread if spread else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks 1..n, equal values sharing their mean rank."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in order[start : end + 1]:
            ranks[place] = (start + end) / 2 + 1
        start = end + 1
    return ranks


def paired_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Mean of ``a[i] - b[i]`` and its standard error (sample deviation / sqrt(n)), in the unit of the values.

    ValueError when the two differ in length or there are fewer than two pairs (one tells no error).
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"two or more pairs needed, not {len(a)} and {len(b)} values")
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    mean = math.fsum(gaps) / len(gaps)
    variance = math.fsum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1)
    return mean, math.sqrt(variance / len(gaps))


def win_rate(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Share of pairs where ``a[i] > b[i]``, ties counted half: {value, low, high, n}, 95 % Wilson interval.

    ValueError when the two differ in length or are empty.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"as many a as b needed, not {len(a)} and {len(b)} values")
    wins = sum(1.0 if x > y else 0.5 if x == y else 0.0 for x, y in zip(a, b, strict=True))
    value, low, high = accuracy_interval(wins, len(a))
    return {"value": value, "low": low, "high": high, "n": len(a)}
