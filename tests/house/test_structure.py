"""House rules on files, functions, names and imports (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import re
import sys
from statistics import median

import pytest

from tests.house.source import PACKAGES, ROOT, functions, imports, modules, reachable

MODULES = pytest.mark.parametrize("module", modules(), ids=lambda module: module.shown)
HEAVY = {"torch", "transformers", "peft", "accelerate", "trl", "bitsandbytes", "datasets", "wandb", "safetensors.torch"}
TORCH_FREE = re.compile(
    r"data_prep\..*|reward\.rules(\..*)?|align\.adapters(\.[a-z_]+)?|align\.stages(\.[a-z_]+)?|align"
    r"|align\.(cli|config|report|runs|sweeps|tracking)(\..*)?|align\.planning(\.[a-z_]+)?"
    r"|align\.(rl|serving|weights)\.options|align\.rl\.(gold|signals(\..*)?)"
)
FOREIGN = {
    "align.models.packing.attend": "transformers' AttentionInterface",
    "align.models.varlen.plain": "torch's varlen_attn",
}
"""Signatures that another library dictates, and which."""
MOST_LINES, MEDIAN_LINES = 500, 150
BANNED = re.compile(r"(^|_)(manager|helper|utils?|handler)s?(_|$)")


@MODULES
def test_files_are_short(module):
    assert module.lines <= MOST_LINES


def test_half_of_the_files_fit_on_three_screens():
    """Of the files that hold code: those of one line would make the median cheap."""
    assert median(module.lines for module in modules() if len(module.tree.body) > 1) <= MEDIAN_LINES


@MODULES
def test_functions_are_short(module):
    long = [
        f"{name}: {node.end_lineno - node.lineno + 1} lines"
        for name, node, _ in functions(module)
        if node.end_lineno - node.lineno + 1 > 60
    ]
    assert not long


@MODULES
def test_functions_take_few_parameters(module):
    wide = []
    for name, node, in_class in functions(module):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len(arguments) - (1 if in_class and arguments and arguments[0].arg in ("self", "cls") else 0)
        if count > 7 and f"{module.name}.{name}" not in FOREIGN:
            wide.append(f"{name}: {count}")
    assert not wide


@MODULES
def test_names_say_what_things_do(module):
    names = [module.name.rpartition(".")[2]]
    names += [node.name for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    spelled = {name: re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower() for name in names}
    assert not [name for name, words in spelled.items() if BANNED.search(words)]


@MODULES
def test_modules_open_with_a_docstring(module):
    assert ast.get_docstring(module.tree), "say what the file is"


@MODULES
def test_public_names_have_docstrings(module):
    missing = [
        node.name
        for node in module.tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not missing


@pytest.mark.parametrize(
    "module", [module for module in modules() if TORCH_FREE.fullmatch(module.name)], ids=lambda module: module.shown
)
def test_registration_and_configuration_import_no_torch(module):
    by_name = {item.name: item for item in modules()}
    guilty = {
        name: sorted(found)
        for name in reachable(module.name)
        if (found := {one for one in imports(by_name[name]) if one in HEAVY or one.split(".")[0] in HEAVY})
    }
    assert not guilty


def test_packages_on_disk_are_those_of_the_distribution():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("__init__.py"):
            name = ".".join(path.parent.relative_to(ROOT).parts)
            found.add(name.replace("recipes", "align.recipes", 1) if name.startswith("recipes") else name)
    assert set(settings["packages"]) == found


def test_files_that_are_no_code_are_those_of_the_distribution():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    for package in PACKAGES:
        folder = ROOT / package
        files = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
        patterns = settings["package-data"]["align.recipes" if package == "recipes" else package]
        assert files - {path for pattern in patterns for path in folder.glob(pattern)} == set(), package
