"""README.md of a written folder: its base, licence, data and lineage, what was measured, and code that loads it.

No path of the machine that wrote it stands in it: a base that is no hub id is named by its folder and fingerprint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.checkpoints.card import base_name, front, licence_of, of_base, of_data
from align.inference.forms import Form
from align.inference.loaded import Opened

_SPEAK = """\
talks = [
    [{"role": "user", "content": "Hello!"}],
    [{"role": "user", "content": "How are you today, and what have you been doing?"}],
]
batch = tokenizer.apply_chat_template(
    talks, add_generation_prompt=True, padding=True, padding_side="left", return_tensors="pt", return_dict=True
)
replies = model.generate(**batch, max_new_tokens=64)
print(tokenizer.batch_decode(replies[:, batch["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
base = "BASE"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
"""
_WHOLE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
"""
_SCORE = """\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
talks = [
    [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello! How are you?"}],
    [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "No."}],
]
batch = tokenizer.apply_chat_template(talks, padding=True, return_tensors="pt", return_dict=True)
with torch.no_grad():
    scores = model(**batch).logits[:, 0] + OFFSET
print(((scores - MEAN) / STD).tolist())  # rewards, as chat, evaluation and PPO count them
"""
_NOTES = {
    "score_offset": "what the head added to every score, which a stock head cannot",
    "reward_norm": "mean and deviation of its scores: a reward is (score - mean) / std",
    "read_at": "where a score is read",
}
"""Keys of the record that a user of a reward model must know."""
_SECOND = _SPEAK.splitlines(keepends=True)[2]
"""The second talk, which makes it a batch."""
_GGUF = """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf").eval()  # this folder; needs the package gguf
"""
_CODE = {"merged": _WHOLE + _SPEAK, "sequence_classification": _SCORE, "gguf": _GGUF, "ollama": _GGUF}


def card_of(opened: Opened, record: dict[str, Any]) -> str:
    """The card of what was written from a checkpoint."""
    chain = [opened.checkpoint, *opened.checkpoint.ancestors()]
    name = base_name(str(opened.checkpoint.record["root"]))
    head = f"`{opened.checkpoint.stage}` ({opened.checkpoint.method}), a {opened.checkpoint.role} model"
    parts = [
        f"# {head}\n",
        f"Written by `align` from {opened.checkpoint.label}, in the form `{record['form']}`.\n",
        *of_base(opened.base_folder, name, opened.bases.identity.fingerprint),
        "## Lineage\n",
        "| stage | role | method | base loaded as | digest |\n|---|---|---|---|---|",
        *(f"| {one.stage} | {one.role} | {one.method} | {one.load} | `{one.digest[:16]}` |" for one in chain),
        *of_data((one.stage, one.folder) for one in chain),
        *_measured(opened.checkpoint.record.get("metrics") or {}, record),
    ]
    return _whole(opened.base_folder, record, parts)


def plain_card(base_folder: Path, record: dict[str, Any]) -> str:
    """The card of what was written from a model folder without a record."""
    parts = [
        f"# `{record['of']}` as {record['form']}\n",
        f"Written by `align` from `{record['of']}`.\n",
        *of_base(base_folder, str(record["base"]), None),
        *_measured({}, record),
    ]
    return _whole(base_folder, record, parts)


def _whole(base_folder: Path, record: dict[str, Any], parts: list[str]) -> str:
    """The parts between what the hub reads and the code that loads the folder."""
    form, base = str(record["form"]), str(record["base"])
    adapter = form in (Form.peft.value, Form.lora.value)
    on_base = _ADAPTER.replace('"BASE"', f'"{base}"  # a hub id, or the folder of the base') + _SPEAK
    code = _with_numbers(_CODE[form], record) if form in _CODE else on_base
    if adapter and "padded" in record and "left" not in record["padded"]:  # virtual tokens stand before the padding
        code = code.replace(_SECOND, "")
    head = front(base, licence_of(base_folder), "peft" if adapter else "transformers")
    return "\n".join([head, *parts, "## Load it\n", f"```python\n{code}```", ""])


def _with_numbers(code: str, record: dict[str, Any]) -> str:
    """Code with the numbers that make rewards of a reward model's logits."""
    norm = record.get("reward_norm") or {"mean": 0.0, "std": 1.0}
    told = {"OFFSET": record.get("score_offset") or 0.0, "MEAN": norm["mean"], "STD": norm["std"]}
    for name, number in told.items():
        code = code.replace(name, repr(float(number)))
    return code


def _measured(metrics: dict[str, Any], record: dict[str, Any]) -> list[str]:
    drift = record.get("drift") or {}
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    told = {"KL to what was trained (nats per token)": drift.get("kl"), "largest difference": drift.get("max_logit")}
    rows = [f"| {name} | {value:.6g} |" for name, value in {**numbers, **told}.items() if value is not None]
    notes = [f"- {key} ({says}): {record[key]}" for key, says in _NOTES.items() if record.get(key)]
    return ["\n## Measured\n", "| what | value |\n|---|---|", *rows, "", *notes, ""]
