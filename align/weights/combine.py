"""`align combine`: adapters of several tasks as one LoRA, with the held-out loss of each task before and after.

    linear       the weighted sum of the changes; exact, the ranks add
    svd          the same sum, cut to `rank`
    ties         "TIES-Merging", arXiv 2306.01708: keep the largest entries, elect signs, average those that agree
    dare_linear  "Language Models are Super Mario", arXiv 2311.03099: drop entries at random, rescale the rest, add
    dare_ties    DARE's dropping with TIES' election of signs

The last three are peft's, applied here to the dense change of each layer (peft applies them to the factors, whose
product is not the combined change), and the result is factored again. Cost: one dense matrix per layer and adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from peft.utils import merge_utils
from torch import Tensor

from align.checkpoints.card import base_name
from align.inference.loaded import Opened
from align.inference.mixed_batch import Mixed, put_on_one_base
from align.models.low_rank import Kept, LowRankTerm, LowRankTerms, combined, factored, stack, truncated
from align.roles import Role
from align.weights.card import card_of
from align.weights.drift import measure, of_model, of_role
from align.weights.options import CombineOptions, How, place
from align.weights.output import publish_adapter
from align.weights.peft_lora import write_lora
from data_prep.core.errors import UserError
from data_prep.core.options import build
from data_prep.options import DataOptions, LengthOptions, OnLong
from data_prep.prepare.prepare import prepare
from data_prep.types import RowKind, Tokens

_COMBINATION = "combined"
_DENSITY = 0.5


def combine(targets: Sequence[str], options: CombineOptions) -> dict[str, Any]:
    """Write the combination of several checkpoints on one base as a plain LoRA adapter.

    Args:
        targets: two or more checkpoints: paths, RUN or RUN/STAGE.
        options: how, weights, density, rank, rows to measure on.

    Returns:
        out, how, weights, rank, and `losses`: task -> mean held-out loss per supervised token (nats) of the base, of
        the task's own adapter and of the combination.

    Raises:
        UserError: fewer than two targets, different bases, a method without a low-rank form, or misfitting options.
    """
    opened = [Opened.target(target, options.out, options.base) for target in targets]
    weights = _weights(options, len(opened))
    put_on_one_base(opened)
    first = opened[0]
    folder = place(options.to, first.checkpoint.folder, options.how.value)
    layers = [one.terms("combine") for one in opened]
    torch.manual_seed(options.seed)
    terms = _COMBINED[options.how](layers, weights, options)
    tree = first.bases.root(first.load).tree()
    stack(tree, terms)
    joint = Role("combined", tree, None).freeze()
    tasks = _named(opened)
    mixed = Mixed.of(tasks, {_COMBINATION: [terms]})

    def write(staging: Path) -> dict[str, Any]:
        write_lora(staging, terms, base_name(first.checkpoint.record["root"]), first.role.tree)
        return {
            "form": "lora",
            "of": " + ".join(one.checkpoint.label for one in opened),
            "digests": [one.checkpoint.digest for one in opened],
            "base": base_name(first.checkpoint.record["root"]),
            "how": options.how.value,
            "weights": weights,
            "rank": max(term.down_RI.shape[0] for term in terms.values()),
            "losses": {name: _losses(mixed, name, _held_out(one, options.rows)) for name, one in tasks.items()},
            "drift": measure(of_role(joint), of_model(first.on_base(staging)), first.rows()).as_dict(),
        }

    return publish_adapter(folder, first.tokenizer, write, lambda record: card_of(first, record))


def _weights(options: CombineOptions, count: int) -> list[float]:
    if count < 2:
        raise UserError("combine needs two or more TARGETs", code="no_target")
    averages = options.how in (How.ties, How.dare_ties)  # over the adapters that agree, entry by entry
    given = list(options.weights) or [1.0 if averages else 1.0 / count] * count
    if len(given) != count:
        raise UserError(f"one weight for each TARGET (got {len(given)}; expected {count})", field="weights")
    if options.how is How.linear and options.rank is not None:
        raise UserError("how=linear is exact and keeps every rank", field="rank", hint="how=svd cuts the same sum")
    if options.how is not How.linear and options.rank is None:
        raise UserError(f"how={options.how.value} needs a rank to cut to", field="rank", hint="rank=16")
    if options.how in (How.linear, How.svd) and options.density is not None:
        raise UserError(f"how={options.how.value} drops no entries", field="density", hint="leave it out")
    return given


def _named(opened: Sequence[Opened]) -> dict[str, Opened]:
    """Checkpoints by label; by folder where two have one label."""
    labels = [one.checkpoint.label for one in opened]
    return {
        label if labels.count(label) == 1 else str(one.checkpoint.folder): one
        for label, one in zip(labels, opened, strict=True)
    }


def _linear(layers: Sequence[LowRankTerms], weights: Sequence[float], options: CombineOptions) -> LowRankTerms:
    scaled = [
        {name: LowRankTerm(term.down_RI, term.up_OR, term.scale * weight) for name, term in terms.items()}
        for terms, weight in zip(layers, weights, strict=True)
    ]
    return combined(scaled)


def _svd(layers: Sequence[LowRankTerms], weights: Sequence[float], options: CombineOptions) -> LowRankTerms:
    kept = Kept(rank=options.rank)
    return {name: truncated(term, kept)[0] for name, term in _linear(layers, weights, options).items()}


def _dense(combination: Callable[[list[Tensor], Tensor, float], Tensor]) -> Any:
    """A combination of dense changes, layer by layer, factored again."""

    def apply(layers: Sequence[LowRankTerms], weights: Sequence[float], options: CombineOptions) -> LowRankTerms:
        kept = Kept(rank=options.rank)
        found: LowRankTerms = {}
        for name in {name: None for terms in layers for name in terms}:
            having = [
                (terms[name].delta(), weight) for terms, weight in zip(layers, weights, strict=True) if name in terms
            ]
            deltas, shares = [delta for delta, _ in having], torch.tensor([weight for _, weight in having])
            density = _DENSITY if options.density is None else options.density
            found[name] = factored(combination(deltas, shares.to(deltas[0].device), density), kept)[0]
        return found

    return apply


_COMBINED: dict[How, Any] = {
    How.linear: _linear,
    How.svd: _svd,
    How.ties: _dense(merge_utils.ties),
    How.dare_linear: _dense(merge_utils.dare_linear),
    How.dare_ties: _dense(merge_utils.dare_ties),
}


def _losses(mixed: Mixed, name: str, rows: Sequence[Tokens]) -> dict[str, float]:
    """Mean loss per supervised token, in nats, of the base, a task's adapter and the combination on the task's rows."""
    found = mixed.losses([(who, row) for row in rows for who in (None, name, _COMBINATION)])
    return {"base": found[None], "own": found[name], "combined": found[_COMBINATION], "rows": len(rows)}


def _held_out(opened: Opened, most: int) -> Sequence[Tokens]:
    """Evaluation rows of the conversations that the checkpoint's stage was trained on."""
    path = opened.checkpoint.folder / "recipe.yaml"
    if not path.is_file():
        raise UserError("no recipe.yaml beside the checkpoint, so its task's data is unknown", file=str(path))
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    longest = min(recipe.get("max_length", opened.context), opened.context)
    length = LengthOptions(max_length=longest, on_long=OnLong.drop, max_lost=1.0)
    data = build(DataOptions, recipe["data"], "data")
    prepared = prepare(RowKind.conversations, data, opened.renderer, length, opened.checkpoint.record.get("seed", 0))
    if not prepared.eval:
        raise UserError(
            f"the task of {opened.checkpoint.label} has no held-out rows to measure on",
            code="no_rows",
            hint="train it with data.conversations.eval_share above 0",
        )
    return list(prepared.eval[:most])
