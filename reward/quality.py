"""How good a reward model is on held-out pairs: as a whole, by kind of pair, by length, and on probes.

Every accuracy has its 95 % Wilson interval; a tie counts half. Imports the standard library alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.types import PairTokens
from reward.gate import GIVEN, MANY
from reward.metrics import accuracy_interval, calibration_bins, calibration_error, length_correlation


def quality(rows: Sequence[PairTokens], chosen: Sequence[float], rejected: Sequence[float]) -> dict[str, Any]:
    """The numbers of pairs from the scores of both sides.

    Returns accuracy, low, high, n, ece, length_corr and the `calibration` bins over all pairs; `by_kind`, kind ->
    {accuracy, low, high, n, margin, ece}; `by_length`, the same for pairs whose better side is longer or shorter;
    `by_token`, the same for pairs whose better or worse side alone has the token that sways the scores most.
    """
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    lengths = [len(row.chosen) for row in rows] + [len(row.rejected) for row in rows]
    bins = calibration_bins(margins)
    kinds: dict[str, list[float]] = {}
    sides: dict[str, list[float]] = {}
    for row, margin in zip(rows, margins, strict=True):
        kinds.setdefault(row.task or GIVEN, []).append(margin)
        if len(row.chosen) != len(row.rejected):
            sides.setdefault("longer" if len(row.chosen) > len(row.rejected) else "shorter", []).append(margin)
    return {
        **ordered(margins),
        "ece": calibration_error(bins),
        "length_corr": length_correlation([*chosen, *rejected], lengths),
        "calibration": bins,
        "by_kind": {kind: _of_kind(own) for kind, own in sorted(kinds.items())},
        "by_length": {side: _of_kind(own) for side, own in sorted(sides.items())},
        "by_token": _by_token(rows, margins),
    }


def _by_token(rows: Sequence[PairTokens], margins: Sequence[float]) -> dict[str, Any]:
    """{token, better, worse}: of the tokens that stand often enough on one side alone, the one that sways the most."""
    sides: dict[int, tuple[list[float], list[float]]] = {}
    for row, margin in zip(rows, margins, strict=True):
        chosen, rejected = set(row.chosen), set(row.rejected)
        for token in chosen ^ rejected:
            sides.setdefault(token, ([], []))[token in rejected].append(margin)
    found: list[dict[str, Any]] = [
        {"token": token, "better": _of_kind(better), "worse": _of_kind(worse)}
        for token, (better, worse) in sorted(sides.items())
        if min(len(better), len(worse)) >= MANY
    ]
    return max(found, key=lambda one: abs(one["better"]["accuracy"] - one["worse"]["accuracy"]), default={})


def ordered(margins: Sequence[float]) -> dict[str, Any]:
    """How often the better reply scores higher: {accuracy, low, high, n}."""
    right = sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins)
    accuracy, low, high = accuracy_interval(right, len(margins))
    return {"accuracy": accuracy, "low": low, "high": high, "n": len(margins)}


def _of_kind(margins: Sequence[float]) -> dict[str, Any]:
    return {
        **ordered(margins),
        "margin": math.fsum(margins) / len(margins),
        "ece": calibration_error(calibration_bins(margins)),
    }


def probed(margins: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Of every probe how often the good reply scores higher, and by how much on average."""
    return {name: {**ordered(own), "margin": math.fsum(own) / len(own)} for name, own in margins.items()}
