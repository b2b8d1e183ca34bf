"""How often a reward model orders the pairs of a benchmark rightly, by subset and section.

"RewardBench: Evaluating Reward Models for Language Modeling", arXiv 2403.13787: a pair is right where the chosen reply
scores above the rejected one. Every subset and section has its 95 % Wilson interval; a tie counts half. Differs: a
section's accuracy is over its pairs, where the paper weighs the mathematics of its last section up. Costs two replies
scored a pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from align.evaluation.options import PairsOptions
from data_prep.core.errors import TrainingStopped, UserError
from data_prep.options import DataOptions, SourceOptions
from data_prep.records.stream import Given, checked, open_stream, source_rows
from data_prep.sources.files import digest_path, find_files, resolve
from data_prep.types import PREFERENCE, PairTokens
from reward.quality import ordered

if TYPE_CHECKING:
    from data_prep.rendering.renderer import Renderer

SECTIONS = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        "mt-bench-hard",
        "llmbar-natural",
        "llmbar-adver-neighbor",
        "llmbar-adver-GPTInst",
        "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ),
    "Safety": (
        "refusals-dangerous",
        "refusals-offensive",
        "xstest-should-refuse",
        "xstest-should-respond",
        "donotanswer",
    ),
    "Reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}
"""The sections of the paper, by the subsets of its file."""
_SECTION_OF = {subset: section for section, subsets in SECTIONS.items() for subset in subsets}
_COLUMNS = ("section", "subset")


def pairs_refusals(options: PairsOptions, where: str, has_reward: bool) -> Iterator[UserError]:
    """Why pairs cannot be ordered, known before anything is loaded; `where` is `stages.NAME`."""
    if options.pairs is None:
        return
    try:
        find_files(resolve(options.pairs, None))
    except UserError as problem:
        yield problem
    if not has_reward:
        yield UserError(
            "pairs are ordered by a reward model, and there is none",
            field=f"{where}.pairs",
            code="no_reward",
            hint=f"evaluate a reward model (align eval RUN/reward_model), or set {where}.reward=RUN/reward_model",
        )


def pairs_contents(options: PairsOptions) -> list[str]:
    """The hash of the file of pairs."""
    return [str(digest_path(options.pairs, None))] if options.pairs is not None else []


def read_pairs(path: str, renderer: Renderer, room: int | None) -> tuple[list[PairTokens], list[str], int]:
    """The pairs that fit, with the subset (or section) of each, and how many are too long.

    Raises:
        UserError: the file cannot be read, or has bad rows.
    """
    first = source_rows(DataOptions(), SourceOptions(path=path, limit=1))
    column = next((name for name in _COLUMNS if first and name in first[0]), None)
    source = SourceOptions(path=path, columns={"task": column} if column else {})
    records = list(checked(open_stream(Given(DataOptions(), source), PREFERENCE, 0)))
    rows: list[PairTokens] = []
    subsets: list[str] = []
    long = 0
    for record, found in zip(records, renderer.pairs(records), strict=True):
        if isinstance(found, UserError):
            raise found
        if room is not None and len(found.prompt) + max(len(found.chosen), len(found.rejected)) > room:
            long += 1
            continue
        rows.append(replace(found, task=None))
        subsets.append(str(record.meta.get("task", "all")))
    if not rows:
        raise UserError(f"none of {len(records)} pairs fits into {room} tokens", file=path, code="too_long")
    return rows, subsets, long


def ordered_pairs(
    rows: Sequence[PairTokens],
    subsets: Sequence[str],
    score: Callable[[Sequence[tuple[Sequence[int], Sequence[int]]]], list[float]],
) -> dict[str, Any]:
    """The `pairs` of result.json: accuracy, low, high, n over all pairs, by section, and by subset.

    Raises:
        TrainingStopped: a score is not finite.
    """
    scores = score([(row.prompt, reply) for row in rows for reply in (row.chosen, row.rejected)])
    if not all(map(math.isfinite, scores)):
        raise TrainingStopped("the reward model gives scores that are not finite", code="not_finite")
    margins = [chosen - rejected for chosen, rejected in zip(scores[::2], scores[1::2], strict=True)]

    def grouped(names: Sequence[str]) -> dict[str, Any]:
        groups: dict[str, list[float]] = {}
        for name, margin in zip(names, margins, strict=True):
            groups.setdefault(name, []).append(margin)
        return {name: ordered(own) for name, own in sorted(groups.items())}

    sections = [_SECTION_OF.get(subset, subset) for subset in subsets]
    return {**ordered(margins), "sections": grouped(sections), "subsets": grouped(subsets)}
