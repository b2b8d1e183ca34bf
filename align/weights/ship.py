"""`align ship`: a checkpoint for the tool that shall load it, in the form of `export` that suits that tool best.

folder   what stock transformers loads: merged weights, else the adapter; a reward model as a classifier
vllm     a LoRA module, else merged weights, and the `vllm serve` command
gguf     merged weights in one file, for llama.cpp and what is built on it
ollama   that file, and a Modelfile beside it
hub      a folder, and what an upload of it would be; `push=true` uploads it
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from shlex import quote
from typing import Any

from align.checkpoints.card import base_name
from align.config.schema import Load
from align.inference.forms import Form, against
from align.inference.loaded import Opened
from align.weights.export import write_as
from align.weights.hub import listing, repository, require_login, upload
from align.weights.merge import require_mergeable
from align.weights.options import GGUF, ExportOptions, Precision, ShipOptions, To, named, place
from align.weights.output import RECORD, Written, bound_for
from align.weights.vllm import RANKS, form_for, with_modules
from data_prep.core.errors import UserError

_ONLY = {
    "adapter": (To.folder, To.hub),
    "repo": (To.hub,),
    "push": (To.hub,),
    "private": (To.hub,),
    "system": (To.ollama,),
}
"""Options that some destinations alone have."""
_WHY = {
    Form.merged: "one set of weights, which any tool loads",
    Form.sequence_classification: "a reward model, as a stock classifier with one label",
    Form.peft: "the adapter's own files, for stock peft on the base",
    Form.lora: "everything above the base as one plain LoRA, for stock peft on the base",
}


def ship(target: str, options: ShipOptions, force: bool = False) -> dict[str, Any]:
    """Write TARGET as the tool that `options.to` names wants it, opened again and compared.

    Returns:
        What `export` returns, with `to`, `why` it has that form, and what the destination adds: `commands` for vLLM
        and Ollama;
        repo, files and url for the hub.

    Raises:
        UserError: an option that the destination does not have, a checkpoint that its tool cannot have, the folder
            exists, too much drift, or the hub is out of reach.
    """
    to = _destination(options)
    opened = Opened.target(target, options.out, options.base, options.features)
    return _SHIPS[to](opened, options, force)


def _destination(options: ShipOptions) -> To:
    """Where it goes, with nothing asked that this place does not have."""
    if options.to is None:
        places = "|".join(one.value for one in To)
        raise UserError("say what shall load it", field="to", hint=f"to={places}", code="bad_value")
    for each in fields(options):
        if each.name in _ONLY and options.to not in _ONLY[each.name] and getattr(options, each.name) != each.default:
            takers = " or ".join(f"to={one.value}" for one in _ONLY[each.name])
            raise UserError(f"to={options.to.value} has no such option", field=each.name, hint=f"it is for {takers}")
    narrow, other = (Precision.fp16, Precision.bf16) if options.to in GGUF else (Precision.bf16, Precision.fp16)
    if options.load is other:
        raise UserError(f"to={options.to.value} is written at fp32 or {narrow.value}", field="load", code="bad_value")
    return options.to


def _place(opened: Opened, options: ShipOptions, to: To) -> Path:
    return place(options.folder, opened.checkpoint.folder, to.value, key="folder")


def _write(
    opened: Opened, options: ShipOptions, form: Form, folder: Path, force: bool, more: str = ""
) -> dict[str, Any]:
    """The folder in a form."""
    wanted = ExportOptions(load=Load(options.load.value), max_kl=options.max_kl)
    return write_as(opened, form, wanted, folder, force, more)


# ----------------------------------------------------------------------------------------------------- folder and hub
def _form(opened: Opened, adapter: bool) -> tuple[Form, str]:
    """The form for stock libraries, and why it is that one.

    Raises:
        UserError: no stock model computes what it does, or no adapter can.
    """
    problems = against(opened)
    if opened.adapter.traits.owns_weights and not opened.checkpoint.record.get("head") and not adapter:
        return Form.merged, "it is a whole model already"
    order = (Form.peft, Form.lora) if adapter else (Form.merged, Form.sequence_classification, Form.peft, Form.lora)
    for form in order:
        if problems[form] is None:
            aside = problems[Form.merged] if form in (Form.peft, Form.lora) and not adapter else None
            return form, f"{aside}: {_WHY[form]}" if aside else _WHY[form]
    found = opened.checkpoint
    if problems[Form.merged] is None or opened.adapter.traits.owns_weights:
        hint = f"leave adapter=true out; its nearest LoRA: align extract {quote(str(found.folder))} rank=N"
        raise UserError(
            f"{found.label} is no adapter for stock peft: {problems[Form.lora]}", field="adapter", hint=hint
        )
    reader = "align.score" if found.record.get("head") else f"align serve {quote(str(found.folder))}"
    raise UserError(
        f"no stock model computes what {found.label} does ({found.method}, a {found.role} model)",
        code="illegal_form",
        hint=f"use it with {reader}",
    )


def _to_folder(opened: Opened, options: ShipOptions, force: bool) -> dict[str, Any]:
    form, why = _form(opened, options.adapter)
    answer = _write(opened, options, form, _place(opened, options, To.folder), force)
    return {"to": To.folder.value, "why": why, **answer}


def _to_hub(opened: Opened, options: ShipOptions, force: bool) -> dict[str, Any]:
    """The folder, made once: what a dry run showed is what a push uploads."""
    repo = repository(options.repo, opened.checkpoint.folder)
    if options.push:
        require_login()
    form, why = _form(opened, options.adapter)
    answer = _made_before(named(options.folder, opened.checkpoint.folder, To.hub.value), opened, form, options)
    answer = answer or _write(opened, options, form, _place(opened, options, To.hub), force)
    folder = Path(answer["out"])
    found = {"to": To.hub.value, "why": why, **answer, "repo": repo, "files": listing(folder), "url": None}
    if options.push:
        found["url"] = upload(folder, repo, options.private, f"{opened.checkpoint.label}, by align ship")
    return found


def _made_before(folder: Path, opened: Opened, form: Form, options: ShipOptions) -> dict[str, Any] | None:
    """The record of a folder that holds this very checkpoint in this form already; None for any other."""
    path = folder / RECORD
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    wanted = {"digest": opened.checkpoint.digest, "form": form.value, "load": options.load.value}
    if any(record.get(key) != value for key, value in wanted.items()):
        return None
    return {"out": str(folder), "reloaded_ok": True, **record}


# ---------------------------------------------------------------------------------------------------- GGUF and Ollama
def _to_gguf(opened: Opened, options: ShipOptions, force: bool) -> dict[str, Any]:
    answer = _in_gguf(opened, options, force, To.gguf, _LLAMA_CPP)
    return {"to": To.gguf.value, "why": "merged weights, tokenizer and chat template in one file", **answer}


def _to_ollama(opened: Opened, options: ShipOptions, force: bool) -> dict[str, Any]:
    """The file and the Modelfile; the chat template is learnt and proven before weights load."""
    from align.weights import gguf_file, ollama
    from align.weights.go_template import changes

    opened.require_language_model("to=ollama")
    turns = ollama.turns_of(opened)
    content = ollama.modelfile(opened, turns, gguf_file.FILE, options.system)
    name, notes = ollama.name_of(opened.checkpoint.folder), changes(turns, ollama.prompt_of(opened))
    readme = "\n".join([_OLLAMA.format(name=name), *(f"- {note}" for note in notes), ""])
    answer = _in_gguf(opened, options, force, To.ollama, readme, {ollama.FILE: content})
    command = shlex.join(["ollama", "create", name, "-f", str(Path(answer["out"]) / ollama.FILE)])
    why = "merged weights and tokenizer in one file, the chat template in Go's language in a Modelfile"
    return {"to": To.ollama.value, "why": why, **answer, "notes": notes, "commands": [command]}


def _in_gguf(
    opened: Opened, options: ShipOptions, force: bool, to: To, readme: str, beside: dict[str, str] | None = None
) -> dict[str, Any]:
    """A folder with a GGUF file, and files beside it that say how a prompt begins in its place."""
    from align.weights.gguf_file import compare_gguf, require_covered, write_gguf

    opened.require_language_model(f"to={to.value}")
    if not opened.adapter.traits.owns_weights:
        require_mergeable(opened)
    require_covered(opened)
    wanted = ExportOptions(load=Load.fp32 if options.load is Precision.fp32 else Load.bf16, max_kl=options.max_kl)
    folder, notes = _place(opened, options, to), {"load": options.load.value}
    written = Written(to.value, folder, bound_for(wanted, opened), force, notes, readme)

    def write(staging: Path) -> None:
        write_gguf(opened, staging, options.load, bare=bool(beside))
        for name, text in (beside or {}).items():
            (staging / name).write_text(text, encoding="utf-8")

    return written.make(opened, write, lambda staging: compare_gguf(opened, staging))


_LLAMA_CPP = """
## Run it with llama.cpp

In this folder:

```bash
llama-server -m model.gguf --jinja
```

`llama-quantize model.gguf q8.gguf Q8_0` makes it smaller.
"""
_OLLAMA = """
## Run it with Ollama

In this folder:

```bash
ollama create {name} -f Modelfile
ollama run {name}
```
"""


# --------------------------------------------------------------------------------------------------------------- vLLM
def _to_vllm(opened: Opened, options: ShipOptions, force: bool) -> dict[str, Any]:
    """The folder, and the command that serves it: with its place for the terminal, from within it for its README."""
    opened.require_language_model("to=vllm")
    form, why = form_for(opened)
    rank = 0
    if form is Form.lora:
        rank = max(term.down_RI.shape[0] for term in opened.terms("to=vllm").values())
        if rank > RANKS[-1]:
            form, why = Form.merged, f"its rank is {rank}, and vLLM takes {RANKS[-1]} at most"
    folder = _place(opened, options, To.vllm)
    name = opened.checkpoint.stage

    def command(base: str, place: str) -> str:
        if form is Form.merged:
            return shlex.join(["vllm", "serve", place, "--served-model-name", name])
        return shlex.join([*with_modules(base, {name: place}, rank), "--tokenizer", place])

    base = base_name(str(opened.checkpoint.record["root"]))
    told = _SERVE.format(command=command(base, "."), name=name)
    answer = _write(opened, options, form, folder, force, told)
    return {"to": To.vllm.value, "why": why, **answer, "commands": [command(str(opened.base_folder), str(folder))]}


_SERVE = """
## Serve it with vLLM

In this folder:

```bash
{command}
```

Programs ask for the model `{name}`, by OpenAI's protocol.
"""
_SHIPS: dict[To, Callable[[Opened, ShipOptions, bool], dict[str, Any]]] = {
    To.folder: _to_folder,
    To.vllm: _to_vllm,
    To.hub: _to_hub,
    To.gguf: _to_gguf,
    To.ollama: _to_ollama,
}
