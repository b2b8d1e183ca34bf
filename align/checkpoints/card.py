"""README.md of a stage's folder, and what it has in common with the cards of exports: base, licence, data, code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from align.checkpoints.checkpoint import Checkpoint
from align.checkpoints.compatibility import adapter_of
from align.models.chat_template import TEMPLATE, bare
from data_prep.core.files import write_text

_SPEAK = """\
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello!"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
reply = model.generate(**prompt, max_new_tokens=64)
print(tokenizer.decode(reply[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_LOAD = """\
import align

model, tokenizer = align.load(".")  # this folder, or RUN/STAGE
"""
_SCORE = """\
import align

print(align.score(".", ["Hello!"], ["Hello! How are you?"]))  # of this folder, or RUN/STAGE; a reward for each reply
"""
_PEFT = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = "BASE"  # a hub id, or the folder of the base
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), ".").eval()
"""
_WHOLE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".").eval()
"""
_DRESS = f"""\
tokenizer.chat_template = open("{TEMPLATE}", encoding="utf-8").read()  # it was trained with this one
"""


def write_card(checkpoint: Checkpoint, base_folder: Path, data: Path, command: str) -> None:
    """Write what a checkpoint is, what it was made from, and how it is loaded.

    Args:
        checkpoint: as it was saved.
        base_folder: the base at the root of its chain.
        data: the folder of the stage, which has its data card.
        command: what made it.
    """
    record, below = checkpoint.record, checkpoint.ancestors()
    metrics = record["metrics"].items()
    stages = [(checkpoint.stage, data), *((one.stage, one.folder) for one in below)]
    stands = ", ".join(f"{one.role} `{one.digest[:8]}`" for one in checkpoint.parents())
    parts = [
        front(
            base_name(str(record["root"])),
            licence_of(base_folder),
            "transformers" if adapter_of(checkpoint).traits.owns_weights else "peft",
        ),
        f"# {checkpoint.stage} ({checkpoint.method})\n",
        f"A {checkpoint.role} model, its base loaded as `{checkpoint.load}`. "
        f"Stands on: {stands or 'the base alone'}.\n",
        f"Made by `{command}`; `checkpoint.json` holds lineage, hashes and probe.\n",
        *of_base(base_folder, base_name(str(record["root"])), record["base"]["fingerprint"]),
        "## Load it\n",
        *_code(checkpoint),
        *of_data(stages),
        "\n## Measured\n",
        "| metric | value |\n|---|---|",
        *(f"| {name} | {value:.6g} |" for name, value in metrics if isinstance(value, int | float)),
        "",
    ]
    write_text(checkpoint.folder / "README.md", "\n".join(parts))


def _code(checkpoint: Checkpoint) -> list[str]:
    """How it is used: in Python with this toolkit, and with stock libraries where they compute the same."""
    traits = adapter_of(checkpoint).traits
    if checkpoint.role == "value":
        return ["The critic of the policy beside it; PPO goes on with it by `stages.ppo.critic=parent`.\n"]
    if checkpoint.role == "reward":
        form = "For other tools: `align export . form=sequence_classification`.\n"
        return [f"```python\n{_SCORE}```\n", form]
    stock = traits.portable and _on_base_alone(checkpoint)
    if not (stock or traits.owns_weights or traits.mergeable):
        return ["No stock model computes what it does: `align chat .`\n"]
    parts = [f"```python\n{_LOAD}{_SPEAK}```\n"]
    if traits.owns_weights:
        parts += ["Or without this toolkit:\n", f"```python\n{_WHOLE}{_SPEAK}```\n"]
    elif stock:
        dress = _DRESS if (checkpoint.folder / TEMPLATE).is_file() else ""
        code = _PEFT.replace("BASE", base_name(str(checkpoint.record["root"]))) + dress + _SPEAK
        parts += ["Or without this toolkit:\n", f"```python\n{code}```\n"]
    else:
        parts += [
            "Loaded by stock peft onto the base alone it says something else; for other tools: `align export .`\n"
        ]
    return parts


def _on_base_alone(checkpoint: Checkpoint) -> bool:
    """Whether its adapter stands on the base's own weights: on no merged, stacked or fully tuned parent."""
    if checkpoint.record.get("derived_base") or checkpoint.on_parent == "stack":
        return False
    parent = checkpoint.parent("init")
    return parent is None or _on_base_alone(parent)


def front(base: str, licence: str | None, library: str) -> str:
    """What the hub reads on top of a card."""
    facts: dict[str, Any] = {"base_model": base, "library_name": library, "tags": ["align"]}
    if licence:
        facts["license"] = licence
    return f"---\n{yaml.safe_dump(facts, sort_keys=True, allow_unicode=True)}---"


def base_name(root: str) -> str:
    """What a base is called elsewhere: its hub id, else the name of its folder."""
    if root.startswith("package:"):
        return root.removeprefix("package:")
    path = Path(root).expanduser()
    local = path.is_absolute() or path.exists() or root.count("/") != 1 or root.startswith(".")
    return path.name if local else root


def of_base(folder: Path, name: str, fingerprint: str | None) -> list[str]:
    """The section on a base: its name, fingerprint and licence."""
    licence = licence_of(folder) or "not stated in its folder: look it up before you pass this on"
    known = f"; fingerprint `{fingerprint[:16]}`" if fingerprint else ""
    return ["## Base\n", f"`{name}`{known}. Licence of the base: {licence}.\n"]


def licence_of(folder: Path) -> str | None:
    """The licence that a model folder's README names for the hub."""
    readme = bare(folder) / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    found = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        facts = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return None
    licence = facts.get("license") if isinstance(facts, dict) else None
    return str(licence) if licence else None


def of_data(stages: Iterable[tuple[str, Path]]) -> list[str]:
    """The section on data: what each stage, given by name and folder, was trained on by its data card."""
    lines = []
    for name, folder in stages:
        path = folder / "data_card.json"
        if path.is_file():
            card = json.loads(path.read_text(encoding="utf-8"))
            licence = card.get("license") or "not stated"
            lines.append(f"| {name} | {_without_paths(card.get('source'))} | {card['rows']['kept']} | {licence} |")
    table = ["| stage | source | rows | licence |\n|---|---|---|---|", *lines]
    return ["\n## Data\n", *(table if lines else ["Not known: the stages keep no data card here."])]


def _without_paths(source: Any) -> str:
    """A source's description, its files by name alone."""
    words = re.split(r"(\s+)", str(source))
    local = [word for word in words if word.startswith(("/", "~", ".")) or word.count("/") > 1]
    return "".join(Path(word).name if word in local else word for word in words)
