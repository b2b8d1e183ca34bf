"""`align export`: a checkpoint in the form that another tool loads, reloaded there and compared.

peft                     the adapter itself, where the base alone is what it stands on
lora                     everything above the base as one plain LoRA: VeRA, Delta-LoRA, stacked chains
merged                   one set of weights, no adapter (see merging.py)
sequence_classification  a reward model as `AutoModelForSequenceClassification` with one label
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from align.inference.loaded import Opened
from align.models.packing import pack
from align.weights.drift import Drift, measure, of_model, of_role
from align.weights.merge import compare_model, merged_model
from align.weights.options import ExportOptions, Form, place
from align.weights.output import Written, bound_for, save_model
from align.weights.peft_lora import write_lora
from data_prep.core.errors import UserError


def export(target: str, options: ExportOptions, force: bool = False) -> dict[str, Any]:
    """Write TARGET in a form that other tools load; see the file's head for the forms.

    Raises:
        UserError: the checkpoint cannot have that form (with those it can have), the folder exists, or too much drift.
    """
    opened = Opened.target(target, options.out)
    form = options.form or _natural(opened)
    problem = _against(opened)[form]
    if problem:
        legal = [name.value for name, why in _against(opened).items() if not why]
        hint = f"possible: {', '.join(legal)}" if legal else "no other form is possible either"
        if form is Form.lora and _against(opened)[Form.merged] is None:
            hint += f"; its nearest LoRA: align extract {opened.checkpoint.folder} rank=N"
        raise UserError(f"form={form.value} cannot be: {problem}", code="illegal_form", hint=hint)
    write, compare = _FORMS[form]
    bound = bound_for(options, opened)
    written = Written(
        form.value, place(options.to, opened.checkpoint.folder, form.value), bound, force, {"load": options.load.value}
    )
    if form is Form.sequence_classification:
        written.notes.update(score_notes(opened))
    return written.make(
        opened, lambda staging: write(opened, staging, options), lambda staging: compare(opened, staging)
    )


def _natural(opened: Opened) -> Form:
    """The first form that loses nothing."""
    return next((form for form, problem in _against(opened).items() if not problem), Form.peft)


def _against(opened: Opened) -> dict[Form, str | None]:
    """Form -> why this checkpoint cannot have it, or None."""
    checkpoint, traits = opened.checkpoint, opened.adapter.traits
    head = f"a {checkpoint.record['role']} model has a head, which that form would lose"
    whole = "it is a whole model already" if traits.owns_weights else None
    merge = whole or (None if traits.mergeable else f"{checkpoint.method} is no change of weights")
    below = None
    if checkpoint.record.get("derived_base"):
        below = "it stands on weights that exist in this chain only"
    stacked = "it is stacked on its parent's adapter" if opened.bases.terms_under(checkpoint, opened.load) else None
    speaks = head if checkpoint.record.get("head") else None
    return {
        Form.sequence_classification: None if speaks and not (merge and not whole) else "it has no head",
        Form.peft: speaks or whole or below or stacked or (None if traits.portable else "stock peft lacks the method"),
        Form.lora: speaks or whole or below or (None if traits.low_rank else "its change is no low-rank sum"),
        Form.merged: speaks or merge,
    }


# ------------------------------------------------------------------------------------------------------ peft and lora
def _write_peft(opened: Opened, folder: Path, options: ExportOptions) -> None:
    """The adapter's own files, naming the base, and the tokenizer."""
    for name in opened.adapter.files():
        shutil.copyfile(opened.checkpoint.folder / name, folder / name)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = _base_name(opened)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    opened.tokenizer.save_pretrained(folder)


def _write_lora(opened: Opened, folder: Path, options: ExportOptions) -> None:
    terms = opened.terms("form=lora")
    write_lora(folder, terms, _base_name(opened), opened.role.tree)
    opened.tokenizer.save_pretrained(folder)


def _base_name(opened: Opened) -> str:
    """A hub id stays one; an embedded or local base is named by its folder."""
    root = str(opened.checkpoint.record["root"])
    return str(opened.base_folder) if root.startswith("package:") or Path(root).exists() else root


def _compare_adapter(opened: Opened, folder: Path) -> Drift:
    """The adapter loaded by stock peft on the base's dense weights, against the trained role."""
    return measure(of_role(opened.role), of_model(opened.on_base(folder)), opened.rows())


# ---------------------------------------------------------------------------------------------- merged and classifier
def _write_merged(opened: Opened, folder: Path, options: ExportOptions) -> None:
    save_model(merged_model(opened), opened, folder, options.load)


def score_notes(opened: Opened) -> dict[str, Any]:
    """What a user of the classifier must know: its offset, and the normalisation that PPO uses."""
    assert opened.role.head is not None
    return {
        "score_offset": float(opened.role.head.score.bias),
        "reward_norm": opened.checkpoint.record.get("reward_norm"),
        "read_at": "the end-of-turn token of the reply; leave out what the chat template writes after it",
    }


def _write_classifier(opened: Opened, folder: Path, options: ExportOptions) -> None:
    """Trunk and head as a stock classifier with one label; stock heads have no bias, so a bias is only recorded."""
    model = merged_model(opened)
    config = model.config
    config.num_labels, config.pad_token_id = 1, _padding(opened)
    classifier = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    prefix = model.base_model_prefix
    getattr(classifier, prefix).load_state_dict(getattr(model, prefix).state_dict())
    assert opened.role.head is not None
    with torch.no_grad():
        classifier.score.weight.copy_(opened.role.head.score.weight)
    save_model(classifier, opened, folder, options.load)


def _padding(opened: Opened) -> int:
    """A padding id that never ends a reply: stock pooling takes the last token that is not padding."""
    tokenizer = opened.tokenizer
    end = opened.renderer.end_token_id
    choices = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    return next((int(one) for one in choices if one is not None and one != end), 0 if end else 1)


@torch.no_grad()
def _compare_scores(opened: Opened, folder: Path) -> Drift:
    """Scores of the probe by the stock classifier against the role's; KL is between preferences of neighbours."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True, dtype="auto")
    torch.nn.Module.to(model, opened.role.tree.device).eval()
    assert opened.role.head is not None
    ours, theirs = [], []
    for row in opened.checkpoint.record["probe"]["input_ids"]:
        packed = pack([row]).to(opened.role.tree.device)
        last = torch.tensor([len(row) - 1], device=opened.role.tree.device)
        ours.append(opened.role.scores(packed, last) - opened.role.head.score.bias)
        theirs.append(model(input_ids=torch.tensor([row], device=model.device)).logits[0].float())
    first, second = torch.cat(ours).double().cpu(), torch.cat(theirs).double().cpu()
    return Drift(
        max_logit=float((first - second).abs().max()),
        kl=_preference_kl(first.diff(), second.diff()),
        argmax_agreement=float(((first.diff() > 0) == (second.diff() > 0)).double().mean()) if len(ours) > 1 else 1.0,
        tokens=len(ours),
    )


def _preference_kl(first: Tensor, second: Tensor) -> float:
    """Mean KL between Bradley-Terry preferences with these margins, nats."""
    if not len(first):
        return 0.0
    p, log = torch.sigmoid(first), torch.nn.functional.logsigmoid
    return float((p * (log(first) - log(second)) + (1 - p) * (log(-first) - log(-second))).mean())


_FORMS: dict[Form, tuple[Callable[[Opened, Path, ExportOptions], None], Callable[[Opened, Path], Drift]]] = {
    Form.peft: (_write_peft, _compare_adapter),
    Form.lora: (_write_lora, _compare_adapter),
    Form.merged: (_write_merged, compare_model),
    Form.sequence_classification: (_write_classifier, _compare_scores),
}
