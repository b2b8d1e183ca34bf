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
from itertools import pairwise
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from align.checkpoints.card import base_name
from align.inference.forms import Form, against
from align.inference.loaded import TEXTS, Opened
from align.models.loading import load_weights
from align.models.tokenizer import open_tokenizer
from align.roles import outputs
from align.weights.drift import Drift
from align.weights.merge import compare_logits, compare_model, merged_model, write_merged
from align.weights.options import ExportOptions, place
from align.weights.output import ALONE, PADDED, Compared, Written, bound_for, save_model
from align.weights.padding import SIDES, ending_at, outputs_of_batch, padded_tokenizer
from align.weights.peft_lora import write_lora
from data_prep.core.errors import UserError


def export(target: str, options: ExportOptions, force: bool = False) -> dict[str, Any]:
    """Write TARGET in a form that other tools load; see the file's head for the forms.

    Raises:
        UserError: the checkpoint cannot have that form (with those it can have), the folder exists, or too much drift.
    """
    opened = Opened.target(target, options.out, options.base, options.features)
    form = options.form or _natural(opened)
    problem = against(opened)[form]
    if problem:
        legal = [name.value for name, why in against(opened).items() if not why]
        hint = f"possible: {', '.join(legal)}" if legal else "no other form is possible either"
        if form is Form.lora and against(opened)[Form.merged] is None:
            hint += f"; its nearest LoRA: align extract {quote(str(opened.checkpoint.folder))} rank=N"
        raise UserError(f"form={form.value} cannot be: {problem}", code="illegal_form", hint=hint)
    return write_as(opened, form, options, place(options.to, opened.checkpoint.folder, form.value), force)


def write_as(
    opened: Opened, form: Form, options: ExportOptions, folder: Path, force: bool = False, more: str = ""
) -> dict[str, Any]:
    """Write a checkpoint in a form that it can have, compared and with a card, at whose end stands `more`.

    Raises:
        UserError: too much drift.
    """
    write, compare = _FORMS[form]
    notes = {"load": options.load.value}
    written = Written(form.value, folder, bound_for(options, opened), force, notes, more)
    if form is Form.sequence_classification:
        written.notes.update(score_notes(opened))
    return written.make(
        opened, lambda staging: write(opened, staging, options), lambda staging: compare(opened, staging)
    )


def _natural(opened: Opened) -> Form:
    """The first form that loses nothing."""
    return next((form for form, problem in against(opened).items() if not problem), Form.peft)


# ------------------------------------------------------------------------------------------------------ peft and lora
def _write_peft(opened: Opened, folder: Path, options: ExportOptions) -> None:
    """The adapter's own files, naming the base, and the tokenizer."""
    for name in opened.adapter.files():
        shutil.copyfile(opened.checkpoint.folder / name, folder / name)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_name(str(opened.checkpoint.record["root"]))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    padded_tokenizer(opened.tokenizer, "left").save_pretrained(folder)


def _write_lora(opened: Opened, folder: Path, options: ExportOptions) -> None:
    terms = opened.terms("form=lora")
    write_lora(folder, terms, base_name(str(opened.checkpoint.record["root"])), opened.role.tree)
    padded_tokenizer(opened.tokenizer, "left").save_pretrained(folder)


def _compare_adapter(opened: Opened, folder: Path) -> Compared:
    """The adapter loaded by stock peft on the base's dense weights, against the trained role."""
    return compare_logits(opened, opened.on_base(folder), folder)


# ---------------------------------------------------------------------------------------------- merged and classifier
def _write_merged(opened: Opened, folder: Path, options: ExportOptions) -> None:
    write_merged(opened, folder, options.load)


def score_notes(opened: Opened) -> dict[str, Any]:
    """What a user of the classifier must know: its offset, and the normalisation that PPO uses."""
    assert opened.role.head is not None
    return {
        "score_offset": float(opened.role.head.score.bias),
        "reward_norm": opened.checkpoint.record.get("reward_norm"),
        "read_at": "the end-of-turn token of the reply, where the chat template of this folder ends",
    }


def _write_classifier(opened: Opened, folder: Path, options: ExportOptions) -> None:
    """Trunk and head as a stock classifier with one label; stock heads have no bias, so a bias is only recorded."""
    model = merged_model(opened)
    tokenizer = padded_tokenizer(opened.tokenizer, "right", never=opened.renderer.end_token_id)
    ending_at(tokenizer, tokenizer.convert_ids_to_tokens(opened.renderer.end_token_id))
    config = model.config
    config.num_labels = 1
    classifier = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    prefix = model.base_model_prefix
    getattr(classifier, prefix).load_state_dict(getattr(model, prefix).state_dict())
    assert opened.role.head is not None
    with torch.no_grad():
        classifier.score.weight.copy_(opened.role.head.score.weight)
    save_model(classifier, tokenizer, folder, options.load)


@torch.no_grad()
def _compare_scores(opened: Opened, folder: Path) -> Compared:
    """Scores by the stock classifier against the role's: of the probe row by row, and of replies by the folder's own
    tokenizer and template in one batch padded on either side. KL is between preferences of neighbours."""
    model, _ = load_weights(folder, AutoModelForSequenceClassification, dtype="auto")
    torch.nn.Module.to(model, opened.role.tree.device).eval()
    tokenizer, end = open_tokenizer(folder), opened.renderer.end_token_id
    probe = opened.checkpoint.probe_ids
    alone = [model(input_ids=torch.tensor([row], device=model.device)).logits[0].float() for row in probe]
    found = {ALONE: _apart(opened, probe, torch.cat(alone))}
    talks = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        for asked, said in pairwise((*TEXTS, TEXTS[0]))
    ]
    rows = [ids for ids in tokenizer.apply_chat_template(talks)["input_ids"] if len(ids) <= opened.context]
    if not all(row[-1] == end for row in rows):
        raise UserError(
            "the chat template goes on behind the end of a reply, where stock pooling would read the score",
            code="illegal_form",
            hint="score with align.score, or merge the chain's policy alone",
        )
    for side in SIDES:
        scores_B1, _ = outputs_of_batch(model, tokenizer, rows, side)
        found[PADDED + side] = _apart(opened, rows, scores_B1[:, 0].float())
    return found


def _apart(opened: Opened, rows: list[list[int]], theirs_B: Tensor) -> Drift:
    """How far scores of rows are from the role's own, its offset aside."""
    assert opened.role.head is not None
    ours_B = torch.tensor([score for (score,) in outputs(opened.role, rows)]) - float(opened.role.head.score.bias)
    first, second = ours_B.double(), theirs_B.double().cpu()
    return Drift(
        max_logit=float((first - second).abs().max()),
        kl=_preference_kl(first.diff(), second.diff()),
        argmax_agreement=float(((first.diff() > 0) == (second.diff() > 0)).double().mean()) if len(rows) > 1 else 1.0,
        tokens=len(rows),
    )


def _preference_kl(first: Tensor, second: Tensor) -> float:
    """Mean KL between Bradley-Terry preferences with these margins, nats."""
    if not len(first):
        return 0.0
    p, log = torch.sigmoid(first), torch.nn.functional.logsigmoid
    return float((p * (log(first) - log(second)) + (1 - p) * (log(-first) - log(-second))).mean())


_FORMS: dict[Form, tuple[Callable[[Opened, Path, ExportOptions], None], Callable[[Opened, Path], Compared]]] = {
    Form.peft: (_write_peft, _compare_adapter),
    Form.lora: (_write_lora, _compare_adapter),
    Form.merged: (_write_merged, compare_model),
    Form.sequence_classification: (_write_classifier, _compare_scores),
}
