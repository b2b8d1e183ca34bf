"""`align serve engine=vllm`: what vLLM can serve of a chain, written out for it, and the commands that start it.

Policies that are a low-rank sum on the base become LoRA modules of one server. Others are merged: a server for each.
A 4-bit base and an end token that the base does not know make a policy one to merge, too: vLLM would load the base
otherwise, and would not end a reply.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from shlex import quote
from typing import Any

from align.checkpoints.checkpoint import Checkpoint
from align.checkpoints.lineage import chain_of
from align.inference.forms import Form, against
from align.inference.loaded import Opened
from align.serving.options import label_of
from align.serving.served import speakers_of
from align.weights.export import export
from align.weights.options import ExportOptions
from align.weights.output import RECORD
from data_prep.core.errors import UserError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of `--max-lora-rank` that vLLM takes."""


def commands(targets: list[str], out: str, base: str | None) -> dict[str, Any]:
    """Write the policies of TARGETs in forms that vLLM loads, where that is not done yet.

    Returns:
        commands: one line for each server; models: name -> form and path; refused: name -> why.

    Raises:
        UserError: vLLM can serve none of them, or they stand on several bases.
    """
    modules: dict[str, Path] = {}
    whole: dict[str, Path] = {}
    refused: dict[str, UserError] = {}
    folders: set[Path] = set()
    for name, checkpoint in _policies(targets, out).items():
        opened = Opened.target(str(checkpoint.folder), out, base)
        folders.add(opened.base_folder)
        try:
            form, path = _written(opened, base)
        except UserError as problem:
            refused[name] = problem
            continue
        (modules if form is Form.lora else whole)[name] = path
    if len(folders) > 1:
        raise UserError("they stand on several bases", code="wrong_base", hint="ask for each run by itself")
    if not modules and not whole:
        raise next(iter(refused.values()))
    folder = str(folders.pop())
    rank = max(map(_rank, modules.values()), default=0)
    lines = [with_modules(folder, {name: str(path) for name, path in modules.items()}, rank)] if modules else []
    lines += [
        ["vllm", "serve", str(path), "--tokenizer", folder, "--served-model-name", n] for n, path in whole.items()
    ]
    models = {n: {"form": "lora", "path": str(path)} for n, path in modules.items()}
    models |= {n: {"form": "whole", "path": str(path)} for n, path in whole.items()}
    left_out = {n: str(problem) for n, problem in refused.items()}
    return {"commands": [shlex.join(line) for line in lines], "models": models, "refused": left_out}


def _policies(targets: list[str], out: str) -> dict[str, Checkpoint]:
    """The policies of the targets' lineages by the names that `align serve` gives them, lowest first."""
    found: dict[str, Checkpoint] = {}
    for target in targets:
        for speaker in speakers_of(target, out)[0]:
            if isinstance(speaker, Path) or speaker.foreign:
                raise UserError(
                    "vLLM loads this as it is", file=target, code="not_for_vllm", hint=f"vllm serve {target}"
                )
            for stage, one in chain_of(speaker):
                if one is not None and one.digest not in {each.digest for each in found.values()}:
                    found[label_of(one) if stage in found else stage] = one
    return found


def _written(opened: Opened, base: str | None) -> tuple[Form, Path]:
    """The form that vLLM takes a policy in, and the folder that has it.

    Raises:
        UserError: there is none, or the folder is another checkpoint's.
    """
    checkpoint = opened.checkpoint
    if opened.adapter.traits.owns_weights:
        return Form.merged, checkpoint.folder
    form, _ = form_for(opened)
    folder = checkpoint.folder.parent / "export" / f"{checkpoint.folder.name}-{form.value}"
    if not folder.exists():
        export(str(checkpoint.folder), ExportOptions(to=str(folder), form=form, base=base))
    elif json.loads((folder / RECORD).read_text(encoding="utf-8")).get("digest") != checkpoint.digest:
        raise UserError("was made from another checkpoint", file=str(folder), hint="move it away", code="exists")
    if form is Form.lora and _rank(folder) > RANKS[-1]:
        raise UserError(f"{checkpoint.label}: vLLM takes ranks up to {RANKS[-1]} (this has {_rank(folder)})")
    return form, folder


def form_for(opened: Opened) -> tuple[Form, str]:
    """The form that vLLM takes a policy in, and why it is that one.

    Raises:
        UserError: it takes neither its method nor merged weights.
    """
    problems = against(opened)
    if opened.adapter.traits.owns_weights:
        return Form.merged, "it is a whole model already"
    if problem := problems[Form.lora]:
        why = f"it can be no LoRA module: {problem}"
    elif opened.load.four_bit:
        why = "it was trained on a 4-bit base, which vLLM would load otherwise"
    elif not _ends(opened):
        why = "vLLM would not end its replies on the base, which does not know the template's end token"
    else:
        return Form.lora, "a low-rank sum on the base: vLLM serves it as a LoRA module, others beside it"
    if problem := problems[Form.merged]:
        raise UserError(
            f"{opened.checkpoint.label}: vLLM takes neither the method nor merged weights: {problem}",
            code="not_for_vllm",
            hint=f"align serve {quote(str(opened.checkpoint.folder))} serves it",
        )
    return Form.merged, why


def _ends(opened: Opened) -> bool:
    """Whether the base by itself ends where the chat template ends a turn."""
    path = opened.base_folder / "generation_config.json"
    known = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    ends = known if isinstance(known, list) else [known]
    return opened.renderer.end_token_id in [*ends, opened.tokenizer.eos_token_id]


def _rank(folder: Path) -> int:
    """The largest rank of a LoRA folder's layers."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return int(max([config["r"], *config["rank_pattern"].values()]))


def with_modules(base: str, modules: dict[str, str], rank: int) -> list[str]:
    """The words of the command that serves LoRA modules, by name and folder, of ranks up to `rank` on one base."""
    allowed = next(one for one in RANKS if one >= rank)
    named = [f"{name}={path}" for name, path in modules.items()]
    sizes = ["--max-loras", str(len(modules)), "--max-lora-rank", str(allowed)]
    return ["vllm", "serve", base, "--served-model-name", "base", "--enable-lora", *sizes, "--lora-modules", *named]
