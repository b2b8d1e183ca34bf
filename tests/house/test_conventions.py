"""House rules on what code may say: options explain themselves, no branch on names, nothing unsafe is read."""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from pathlib import Path

import pytest

from align.config.registries import adapters, stages
from align.config.schema import ModelOptions, RunOptions
from data_prep.options import DataOptions, GoldOptions, LengthOptions, SourceOptions
from tests.house.source import ROOT, modules

MODULES = pytest.mark.parametrize("module", modules(), ids=lambda module: module.shown)
OPTIONS = [ModelOptions, RunOptions, DataOptions, GoldOptions, LengthOptions, SourceOptions]
OPTIONS += [cls for _, cls in [*adapters.items(), *stages.items()]]
REGISTERED = sorted({Path(str(sys.modules[cls.__module__].__file__)) for cls in OPTIONS[6:]})
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {("torch", "load"), ("torch", "save"), ("yaml", "load"), ("yaml", "unsafe_load")}
UNSAFE_METHODS = {"save_state", "load_state"}
"""accelerate's versions pickle."""


@pytest.mark.parametrize("cls", OPTIONS, ids=lambda cls: cls.__name__)
def test_every_option_explains_itself(cls):
    silent = [item.name for item in dataclasses.fields(cls) if item.name != "method" and not item.metadata.get("help")]
    assert not silent


@pytest.mark.parametrize("name", adapters.names())
def test_adapters_say_their_method(name):
    assert adapters.get(name).method == name


@pytest.mark.parametrize("path", REGISTERED, ids=lambda path: path.name)
def test_methods_and_stages_name_their_source(path):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert re.search(r"arXiv|[Nn]o paper", text), "give the paper (title, arXiv id, equation), or say there is none"


@MODULES
def test_nothing_branches_on_the_name_of_a_method_or_stage(module):
    names = {*adapters.names(), *stages.names()}
    own = module.path.stem if module.path.parent.name in ("adapters", "stages") else None
    guilty = []
    for node in ast.walk(module.tree):
        compared: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            compared = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            compared = [node.value]
        words = {item.value for part in compared for item in ast.walk(part) if isinstance(item, ast.Constant)}
        if bad := {word for word in words if word in names and word != own}:
            guilty.append(f"line {node.lineno}: {', '.join(sorted(bad))}")
    assert not guilty


@MODULES
def test_nothing_is_pickled_and_no_remote_code_runs(module):
    guilty = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            guilty += [item.name for item in node.names if item.name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES:
            guilty.append(str(node.module))
        elif isinstance(node, ast.Call):
            guilty += [f"line {node.lineno}: {word}" for word in _unsafe(node)]
    assert not guilty


def _unsafe(node: ast.Call) -> list[str]:
    words = []
    if isinstance(node.func, ast.Attribute):
        owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
        if (owner, node.func.attr) in UNSAFE_CALLS or node.func.attr in UNSAFE_METHODS:
            words.append(f"{owner}.{node.func.attr}")
    if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
        words.append(node.func.id)
    for keyword in node.keywords:
        if keyword.arg == "trust_remote_code" and not (
            isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        ):
            words.append("trust_remote_code")
        if keyword.arg == "weights_only":
            words.append("weights_only")
    return words


def test_no_path_of_one_machine_is_written_down():
    private = re.compile(r"(?<![\w.$}])/(home|root|tmp|Users|work|mnt)/\w")
    files = [path for name in ("align", "reward", "data_prep", "recipes") for path in (ROOT / name).rglob("*")]
    files += [path for path in ROOT.iterdir() if path.suffix in (".md", ".toml", ".txt")]
    kept = [path for path in files if path.suffix in (".py", ".yaml", ".md", ".toml", ".txt", ".jinja", ".html")]
    assert not [path.name for path in kept if private.search(path.read_text(encoding="utf-8"))]
