"""`align extract` and `align compress`: any change of weights as a LoRA, and a LoRA of smaller rank, by SVD.

Extraction takes a full fine-tune, or a method whose change has no exact low-rank form (DoRA, IA3), and factors the
change of every linear layer (Eckart-Young). What a LoRA cannot carry, the changes of norms, embeddings and biases, is
measured and said: with them gone the logits keep a gap that no rank closes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.checkpoints.card import base_name
from align.checkpoints.resolve import is_checkpoint, resolve_checkpoint
from align.config.schema import Load
from align.inference.loaded import Opened, probe_rows
from align.models.fingerprint import context_length, read_model_config
from align.models.loading import load_weights
from align.models.location import model_folder
from align.models.low_rank import Kept, LowRankTerms, factored, share_lost, truncated
from align.models.quantised import require_kept
from align.models.tokenizer import open_tokenizer
from align.weights.card import card_of, plain_card
from align.weights.drift import measure, of_model, of_role
from align.weights.merge import merged_model, require_mergeable
from align.weights.options import CompressOptions, ExtractOptions, kept_of, place
from align.weights.output import publish_adapter, within
from align.weights.peft_lora import write_lora
from data_prep.core.errors import UserError


def extract(target: str, options: ExtractOptions) -> dict[str, Any]:
    """Write the difference between a tuned model and its base as a LoRA adapter on that base.

    Returns:
        out, rank (largest), layers (per layer: rank, lost), uncovered (tensor -> relative change),
        drift against the tuned model, and `explained`: the share of the logits' change that the adapter reproduces.

    Raises:
        UserError: TARGET is a LoRA already or no change of weights, or base and model do not have the same tensors.
    """
    kept = Kept(*kept_of(options))
    tuned_folder, base_folder, opened = _places(target, options)
    folder = place(options.to, tuned_folder, "lora")
    if opened is None:
        base, tuned = _model(base_folder), _model(tuned_folder)
    else:
        base, tuned = _plain(opened.bases.root(opened.load).private()), _plain(merged_model(opened))
    _require_same_tensors(base, tuned, tuned_folder)
    terms, layers = _changes(base, tuned, kept)
    uncovered = _uncovered(base, tuned, set(terms))
    tokenizer = open_tokenizer(base_folder)
    rows = probe_rows(tokenizer, [], context_length(read_model_config(base_folder)) or 1024)
    change, name = _distance(base, tuned, rows), base_name(options.base or _root_of(opened, base_folder))

    def write(staging: Path) -> dict[str, Any]:
        write_lora(staging, terms, name, base)
        adapted: Any = PeftModel.from_pretrained(base, str(staging)).eval()
        return {
            "form": "lora",
            "of": opened.checkpoint.label if opened else tuned_folder.name,
            "base": name,
            "rank": max(layer["rank"] for layer in layers.values()),
            "layers": layers,
            "uncovered": uncovered,
            "explained": 1.0 - _distance(tuned, adapted, rows) / change if change else 1.0,
            "drift": measure(of_model(tuned), of_model(adapted), rows).as_dict(),
        }

    return publish_adapter(folder, tokenizer, write, lambda record: plain_card(base_folder, record))


def compress(target: str, options: CompressOptions, force: bool = False) -> dict[str, Any]:
    """Write everything between a checkpoint and its base as one LoRA of smaller rank.

    Returns:
        out, rank (largest), layers (per layer: rank, before, lost), drift against the checkpoint.

    Raises:
        UserError: the checkpoint is no low-rank sum, or stands on weights that exist in its chain only, or what is
            left of it says something else.
    """
    kept = Kept(*kept_of(options))
    opened = Opened.target(target, options.out, options.base)
    before = opened.terms("compress")
    folder = place(options.to, opened.checkpoint.folder, "compressed")
    terms: LowRankTerms = {}
    layers: dict[str, dict[str, float]] = {}
    for name, term in before.items():
        terms[name], singular = truncated(term, kept)
        rank = terms[name].down_RI.shape[0]
        layers[name] = {"rank": rank, "before": len(singular), "lost": share_lost(singular, rank)}

    def write(staging: Path) -> dict[str, Any]:
        write_lora(staging, terms, base_name(opened.checkpoint.record["root"]), opened.role.tree)
        drift = measure(of_role(opened.role), of_model(opened.on_base(staging)), opened.rows())
        forced = within("compressed", drift, options.max_kl, force, "keep a higher rank, or raise max_kl")
        return {
            "form": "lora",
            "of": opened.checkpoint.label,
            "digest": opened.checkpoint.digest,
            "base": base_name(opened.checkpoint.record["root"]),
            "rank": max(layer["rank"] for layer in layers.values()),
            "layers": layers,
            "drift": drift.as_dict(),
            "forced": forced,
        }

    return publish_adapter(folder, opened.tokenizer, write, lambda record: card_of(opened, record))


def _places(target: str, options: ExtractOptions) -> tuple[Path, Path, Opened | None]:
    """(tuned model, base, checkpoint to fold): a checkpoint of full tuning, or any model folder when `base` is given,
    are weights already; another checkpoint has to be folded first."""
    if options.base is not None and not is_checkpoint(target, options.out):
        return model_folder(target), model_folder(options.base), None
    checkpoint = resolve_checkpoint(target, options.out)
    if not (checkpoint.folder / "model.safetensors").is_file():
        opened = Opened.target(target, options.out, options.base)
        _require_foldable(opened)
        return checkpoint.folder, opened.base_folder, opened
    parent = checkpoint.parent("init")
    if parent is None:
        base_folder = checkpoint.base_folder(options.base)
        checkpoint.require(base_folder)
        return checkpoint.folder, base_folder, None
    if not (parent.folder / "model.safetensors").is_file():
        if options.base is not None:
            return checkpoint.folder, model_folder(options.base), None
        raise UserError(
            f"{checkpoint.label} was tuned from {parent.label}, which is an adapter",
            code="no_base",
            hint=f"align merge {quote(str(parent.folder))} to=FOLDER, and give that: base=FOLDER",
        )
    return checkpoint.folder, parent.folder, None


def _root_of(opened: Opened | None, base_folder: Path) -> str:
    return str(opened.checkpoint.record["root"]) if opened else str(base_folder)


def _require_foldable(opened: Opened) -> None:
    """Refuse what is a LoRA already, what cannot be folded, and what stands on weights of its own chain."""
    opened.require_language_model("extract")
    checkpoint, traits = opened.checkpoint, opened.adapter.traits
    if checkpoint.record.get("derived_base"):
        raise UserError(
            f"{checkpoint.label} stands on weights that exist in this chain only",
            code="no_base",
            hint="merge it and its base, and give both: align extract MERGED base=FOLDER",
        )
    if traits.low_rank:
        raise UserError(
            f"{checkpoint.label} ({checkpoint.method}) is an adapter already",
            code="not_full",
            hint=f"align compress {quote(str(checkpoint.folder))} rank=N lowers its rank, "
            f"align export {quote(str(checkpoint.folder))} form=lora gives its plain form",
        )
    require_mergeable(opened)


def _model(folder: Path) -> PreTrainedModel:
    require_kept(read_model_config(folder), Load.fp32)
    return _plain(load_weights(folder, dtype=torch.float32, attn_implementation="eager")[0])


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """A model as stock transformers runs it, nothing in it trained."""
    model.set_attn_implementation("eager")
    model.requires_grad_(False)
    model.eval()
    return model


def _require_same_tensors(base: PreTrainedModel, tuned: PreTrainedModel, folder: Path) -> None:
    first = {name: tuple(tensor.shape) for name, tensor in base.named_parameters()}
    second = {name: tuple(tensor.shape) for name, tensor in tuned.named_parameters()}
    other = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    if other:
        raise UserError(
            f"base and tuned model differ in shape ({len(other)} tensors; first: {other[0]}, "
            f"got {second.get(other[0])}; expected {first.get(other[0])})",
            code="wrong_base",
            file=str(folder),
        )


def _linear(model: PreTrainedModel) -> dict[str, Any]:
    """The linear layers below the output head, by name."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def _weight(module: Any) -> Tensor:
    """[out, in]; GPT-2 keeps it transposed."""
    weight: Tensor = module.weight.data
    return weight.T if isinstance(module, Conv1D) else weight


def _changes(
    base: PreTrainedModel, tuned: PreTrainedModel, kept: Kept
) -> tuple[LowRankTerms, dict[str, dict[str, float]]]:
    """Factored changes of the linear layers that changed, and what each lost."""
    others = _linear(tuned)
    terms: LowRankTerms = {}
    layers: dict[str, dict[str, float]] = {}
    for name, module in _linear(base).items():
        delta = _weight(others[name]).double() - _weight(module).double()
        if not delta.any():
            continue
        terms[name], singular = factored(delta, kept)
        rank = terms[name].down_RI.shape[0]
        layers[name] = {"rank": rank, "lost": share_lost(singular, rank)}
    if not terms:
        raise UserError("no linear layer differs from the base: nothing to extract", code="no_change")
    return terms, layers


def _uncovered(base: PreTrainedModel, tuned: PreTrainedModel, covered: set[str]) -> dict[str, float]:
    """Changed tensors that a LoRA cannot carry -> norm of the change over norm of the tensor."""
    others = dict(tuned.named_parameters())
    found = {}
    for name, tensor in base.named_parameters():
        change = (others[name] - tensor).norm()
        if name.removesuffix(".weight") not in covered and float(change):
            found[name] = float(change / tensor.norm().clamp_min(1e-30))
    return found


@torch.no_grad()
def _distance(first: Any, second: Any, rows: Sequence[list[int]]) -> float:
    """Root of the summed squared logit differences."""
    one, two = of_model(first), of_model(second)
    return math.sqrt(sum(float((one(row).double() - two(row).double()).square().sum()) for row in rows))
