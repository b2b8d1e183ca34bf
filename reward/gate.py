"""Whether a reward model is fit to be optimised against: pass, warn or refuse, each reason with its remedy.

One accuracy hides a kind of pair that is at chance: a reward model right in 95 % of the pairs that differ in style may
give an off-topic reply in the good style more than a good reply in another one. So the verdict looks at every kind of
pair, at probes (`reward/probes.py`), at calibration and at length. Imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GIVEN = "given"
"""What pairs are called that name no kind: those that the data has."""
PASS, WARN, REFUSE = "pass", "warn", "refuse"
LEAST = 20
"""Pairs of a kind below which nothing is said of it."""
MANY = 50
"""Pairs on each side without which nothing is said of a word: there are many words."""
CHANCE, POOR = 0.6, 0.8
"""Accuracy of a kind or a probe: below the first it is refused, below the second it is warned of."""
UNSURE, LOPSIDED, SWAYED, FLAT = 0.15, 0.25, 0.4, 1e-3
"""Calibration error; gap of accuracy between pairs whose better side is longer and shorter, and between those whose
better and worse side has a word; deviation of scores."""
REMEDIES: Mapping[str, str] = {
    "off_topic": "same_style_off_topic",
    "off_topic_over_rejected": "off_topic",
    "truncated": "truncated",
    "repeated": "repeated",
    "shuffled": "shuffled",
    "question_echoed": "same_style_off_topic",
}
"""Probe -> the kind of pair (`data.preferences.negatives`) that teaches it."""
_MORE = "more pairs of this kind, or more epochs of the reward model"
_ADVISED = ("off_topic_over_rejected",)
"""Probes that not every set of preferences wants: they are warned of, never refused."""
_UNJUDGED = ("no_end",)
"""Probes that are shown alone: PPO's `missing_eos_penalty` stands for them."""


def gate(metrics: Mapping[str, Any], std: float) -> dict[str, Any]:
    """{"verdict": pass | warn | refuse, "reasons": [text with a remedy, ...]} of a reward model's held-out numbers.

    Args:
        metrics: accuracy, low, high, n and ece; `by_kind`, `probes` and `by_length` where they were measured, each
            name -> {accuracy, n}; and `by_token`.
        std: the deviation of its scores.
    """
    found = [*_of_all(metrics, std), *_of_length(metrics), *_of_words(metrics)]
    if all(verdict != REFUSE for verdict, _, _ in found):  # else kinds, probes and confidence follow from the whole
        found = [*_of_kinds(metrics), *_of_probes(metrics), *found, *_of_confidence(metrics)]
    verdicts = [verdict for verdict, _, _ in found]
    worst = REFUSE if REFUSE in verdicts else WARN if WARN in verdicts else PASS
    ordered = sorted(found, key=lambda each: each[0] != REFUSE)
    return {"verdict": worst, "reasons": [f"{said}; try {remedy}" for _, said, remedy in ordered]}


Reason = tuple[str, str, str]
"""Verdict, what is wrong, remedy."""


def _of_all(metrics: Mapping[str, Any], std: float) -> list[Reason]:
    share = f"it orders {metrics['accuracy']:.0%} of {metrics['n']} held-out pairs rightly"
    if std < FLAT:
        return [(REFUSE, f"it scores every reply alike (deviation {std:.1e})", "a larger lr, or more epochs")]
    if metrics["n"] < LEAST:
        return [(WARN, f"only {metrics['n']} held-out pairs judge it", "a larger eval_share, or more pairs")]
    if metrics["high"] < 0.5:
        return [(REFUSE, f"{share}, worse than chance", "swapping chosen and rejected: the labels seem turned round")]
    if metrics["low"] <= 0.5:
        return [(REFUSE, f"{share}, no better than chance", "a larger lr, more epochs, or cleaner pairs")]
    return []


def _of_confidence(metrics: Mapping[str, Any]) -> list[Reason]:
    if metrics["n"] < LEAST or metrics["ece"] <= UNSURE:
        return []
    said = f"its confidence is {metrics['ece']:.2f} off its accuracy on average"
    return [(WARN, said, "fewer epochs, or more pairs")]


def _of_kinds(metrics: Mapping[str, Any]) -> list[Reason]:
    found = []
    for kind, numbers in metrics.get("by_kind", {}).items():
        if numbers["n"] >= LEAST and numbers["accuracy"] < POOR and len(metrics["by_kind"]) > 1:
            verdict = REFUSE if numbers["accuracy"] < CHANCE else WARN
            which = "pairs of the data as given" if kind == GIVEN else f"pairs of the kind {kind}"
            said = f"it orders {numbers['accuracy']:.0%} of {numbers['n']} {which} rightly"
            found.append((verdict, said, _MORE))
    return found


def _of_probes(metrics: Mapping[str, Any]) -> list[Reason]:
    found = []
    for name, numbers in metrics.get("probes", {}).items():
        if name in _UNJUDGED or numbers["n"] < LEAST or numbers["accuracy"] >= POOR:
            continue
        verdict = REFUSE if numbers["accuracy"] < CHANCE and name not in _ADVISED else WARN
        said = f"it scores the good reply above a bad one ({name}) in {numbers['accuracy']:.0%} of {numbers['n']}"
        found.append((verdict, said, _remedy(name, metrics.get("by_kind", {}))))
    return found


def _remedy(probe: str, kinds: Mapping[str, Any]) -> str:
    """What to try about a probe: pairs that are made for it, or more of them where it was trained on them already."""
    kind = REMEDIES.get(probe)
    return f"data.preferences.negatives=[{kind}]" if kind and kind not in kinds else _MORE


def _of_length(metrics: Mapping[str, Any]) -> list[Reason]:
    sides = metrics.get("by_length", {})
    longer, shorter = sides.get("longer", {"n": 0}), sides.get("shorter", {"n": 0})
    if min(longer["n"], shorter["n"]) < LEAST or abs(longer["accuracy"] - shorter["accuracy"]) <= LOPSIDED:
        return []
    liked, other = ("long", "shorter") if longer["accuracy"] > shorter["accuracy"] else ("short", "longer")
    said = (
        f"it likes {liked} replies: right in {longer['accuracy']:.0%} of the pairs whose better side is longer, in "
        f"{shorter['accuracy']:.0%} where it is shorter"
    )
    return [(WARN, said, f"more pairs whose better side is {other}")]


def _of_words(metrics: Mapping[str, Any]) -> list[Reason]:
    found = metrics.get("by_token") or {}
    if not found or abs(found["better"]["accuracy"] - found["worse"]["accuracy"]) <= SWAYED:
        return []
    liked, other = (
        ("likes", "worse") if found["better"]["accuracy"] > found["worse"]["accuracy"] else ("shuns", "better")
    )
    word = found.get("word", f"token {found['token']}")
    said = (
        f"it {liked} {word!r}: right in {found['better']['accuracy']:.0%} of the pairs whose better side alone has it, "
        f"in {found['worse']['accuracy']:.0%} where the worse side has"
    )
    return [(WARN, said, f"more pairs whose {other} side has it")]
