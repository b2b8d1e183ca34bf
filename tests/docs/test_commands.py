"""Every `align` command in the documents can be given: `run` lines compose, the others parse."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from align.cli.arguments import read_options, run_folder, split_words, target_of
from align.cli.copy import found_recipe
from align.cli.dispatch import _action, _parser
from align.cli.evaluate import in_full
from align.cli.own_files import with_files
from align.cli.verbs import VERBS
from align.config.compose import compose, survey
from align.config.hydra_loader import combinations, recipes
from align.config.origins import files_of
from align.config.overrides import parse, rewrite
from tests.docs.pages import ROOT, blocks, commands, pages, shell_lines, spans
from tests.tiny import write_jsonl

VERB = {verb.name: verb for verb in VERBS}
KINDS = {"adapters", "stages", "data", "recipes", "models", "trackers", "formats", "rules", "runs"}
TARGETED = {"eval", "lineage", "verify"}
ALONE = {"schema"}
"""Verbs that take no words."""
OWN = {
    "my.jsonl": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "talk.jsonl": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "pairs.jsonl": {"prompt": "q", "chosen": "a", "rejected": "b"},
}
"""The reader's own files that are words of commands, with a row of each."""


@pytest.fixture(scope="module")
def own_recipes(tmp_path_factory):
    """The reader's own recipes as the documents print them: YAML blocks with `# my_recipes/...` on top."""
    folder = tmp_path_factory.mktemp("documents")
    for name, row in OWN.items():
        write_jsonl(folder / name, [row])
    for page in pages():
        for language, text in blocks(page):
            named = re.search(r"^# (my_recipes/\S+\.yaml)$", "\n".join(text.split("\n")[:2]), re.MULTILINE)
            if language == "yaml" and named:
                path = folder / named[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text + "\n", encoding="utf-8")
    return folder


def jobs(words, config_dir):
    """The overrides of every job of a sweep."""
    given = parse(words)
    with recipes(config_dir):
        written = rewrite(given, survey(given)[1])
    listed = OverridesParser.create().parse_overrides(written)
    return combinations(listed)


@pytest.mark.parametrize("command", commands(), ids=lambda command: f"{command.page}: {command.text[:60]}")
def test_command_can_be_given(command, own_recipes, monkeypatch):
    monkeypatch.chdir(own_recipes)
    name, *words = command.words[: command.words.index(">")] if ">" in command.words else command.words
    if name.startswith("-"):
        assert name in ("--help", "--version")
        return
    assert name in VERB, f"no verb '{name}'"
    verb, (_, *words) = _action(VERB[name], [name, *words]) if words[:1] != ["ACTION"] else (VERB[name], [name, "-h"])
    args = _parser(verb).parse_intermixed_args(words)
    if args.help:
        return
    if name in ("run", "check", "plan", "recommend"):
        own = {"plan": ("device",), "recommend": ("device", "goal")}.get(name, ())
        given = with_files([word for word in args.words if word.partition("=")[0] not in own])
        for overrides in jobs(given, args.config_dir) if getattr(args, "multirun", False) else [given]:
            compose(overrides, args.config_dir)
    elif name == "show":
        plain, overrides = split_words(args.words, 1)
        if not plain or plain[0] not in ("RUN", "TARGET"):
            compose([f"experiment={word}" for word in plain] + overrides, args.config_dir)
    elif name == "ls":
        plain, overrides = split_words(args.words, 1)
        assert set(plain) <= KINDS
        run_folder(overrides)
    elif name == "cp":
        if not args.words:
            return
        with recipes(args.config_dir):
            assert args.words[0] == "RECIPE" or files_of("/".join(found_recipe(args.words[0])))
        assert len(args.words) == 2
    elif name == "count":
        compose([word for word in args.words if not word.startswith("model.config=")], args.config_dir)
    elif verb.options:
        module, _, kind = verb.options.partition(":")
        read_options(
            getattr(importlib.import_module(module), kind),
            split_words([word for word in args.words if not word.startswith("[")], 2)[1],
        )
    elif name == "options":
        assert args.words
    elif args.words:
        target, *overrides = args.words
        assert "=" not in target
        if name == "eval":
            compose(["pipeline=evaluate", f"stages.evaluate.init={target}", *in_full(overrides)])
        else:
            target_of(args, name)
    else:
        assert name in ALONE or (name in TARGETED and command.text == f"align {name}")


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.shown)
def test_make_targets_exist(page):
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    known = {line.partition(":")[0] for line in lines if ": " in line and not line.startswith(("\t", "."))}
    named = [line.split()[1] for line in [*shell_lines(page), *spans(page)] if line.startswith("make ")]
    assert set(named) <= known


@pytest.mark.parametrize(
    "text",
    [text for page in pages() for language, text in blocks(page) if language == "python"],
    ids=lambda text: text.split("\n")[0][:40],
)
def test_python_blocks_compile(text):
    compile(text, "block", "exec")


def test_the_method_in_the_documents_works(tmp_path):
    """The example of a new method attaches, counts rightly, and comes back from disk as it was."""
    found = [text for page in pages() for language, text in blocks(page) if text.startswith('"""LoHa')]
    assert len(found) == 1
    example = tmp_path / "loha.py"
    example.write_text(found[0] + "\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1", "PATH": "", "HOME": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["loha", "equal", "equal"]


PROBE = """
import json, sys
from pathlib import Path
import loha
from align.config.compose import compose
adapter = compose(["adapter=loha", "adapter.rank=2", "pipeline=sft"]).stages[0].adapter
print(adapter.method)
import torch
from align.config.schema import Load
from align.models.shared_base import BaseIdentity, SharedBase
from tests.tiny import save_tiny_llama
folder = save_tiny_llama(Path(sys.argv[1]) / "model")
base = SharedBase.open(folder, BaseIdentity("tiny", None, "0"), Load.fp32, torch.device("cpu"))
carrier = adapter.attach(base.tree(), trainable=True)
trained = [p for p in carrier.parameters() if p.requires_grad]
counts = adapter.count(json.loads((folder / "config.json").read_text()))
print("equal" if sum(p.numel() for p in trained) == counts.trainable else "other count")
with torch.no_grad():
    for p in trained:
        p.normal_()
adapter.save(carrier, Path(sys.argv[1]) / "saved")
again = adapter.load(base.tree(), Path(sys.argv[1]) / "saved", trainable=False)
ids = torch.arange(6)[None]
same = torch.equal(carrier(input_ids=ids).logits, again(input_ids=ids).logits)
print("equal" if same else "other output")
"""
