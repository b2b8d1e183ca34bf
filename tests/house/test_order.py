"""The order of the packages (`ORDER`): every import goes down it, and no files need each other in a circle."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.house import picture
from tests.house.order import FOLDERS, ORDER, Import, all_imports, circles, imports_of, imports_up, package_of
from tests.house.source import Module, modules

MODULES = pytest.mark.parametrize("module", modules(), ids=lambda module: module.shown)
FORMS = {
    "at the top": "from align.pipeline import run",
    "a module of a package": "from align import pipeline",
    "by its full name": "import align.pipeline",
    "inside a function": "def later():\n    from align.pipeline import run",
    "for type checkers": "if TYPE_CHECKING:\n    from align.pipeline import run",
    "relative": "from ..pipeline import run",
    "relative, a module": "from .. import pipeline",
    "as a string": 'PLACES = {"run": "align.pipeline"}',
    "as a string with a name": 'WORK = "align.pipeline:run"',
}


def _module(name: str, text: str) -> Module:
    path = Path(f"{name.replace('.', '/')}.py")
    return Module(name, path, ast.parse(text))


@MODULES
def test_every_file_has_a_place(module):
    assert package_of(module.name)


def test_every_place_is_taken_once():
    entries = [entry for line in ORDER for entry in line]
    assert sorted(set(entries)) == sorted(entries)
    assert set(entries) <= {package_of(module.name) for module in modules()}, "of packages that are gone"
    assert {module.name for module in modules()} >= FOLDERS


@MODULES
def test_imports_go_down(module):
    up = imports_up(tuple(imports_of(module)))
    assert not [f"line {each.line} imports {each.imported}" for each in up]


def test_files_form_no_circle():
    assert not circles(all_imports())


def test_nothing_imports_tests_or_benchmarks():
    outside = {"tests", "benchmarks"}
    guilty = []
    for module in modules():
        for node in ast.walk(module.tree):
            names = [item.name for item in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            guilty += [f"{module.shown}: {name}" for name in names if name.split(".")[0] in outside]
    assert not guilty


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_every_form_of_an_import_is_seen(text):
    known = {name: _module(name, "") for name in ("align", "align.models", "align.models.tree", "align.pipeline")}
    found = imports_of(_module("align.models.tree", text), known)
    assert [each.imported for each in found] == ["align.pipeline"]
    assert imports_up(tuple(found)) == found


def test_a_neighbour_on_the_same_line_is_none_of_a_package_s_business():
    beside = Import("align.weights.merge", "align.planning.check", 1)
    inside = Import("align.weights.merge", "align.weights.output", 1)
    assert imports_up((beside, inside)) == [beside]


def test_a_circle_is_found_with_all_its_files():
    ring = tuple(Import(f"align.roles.{a}", f"align.roles.{b}", 1) for a, b in ("ab", "bc", "ca", "cd"))
    assert circles(ring) == [["align.roles.a", "align.roles.b", "align.roles.c"]]


def test_a_file_without_a_place_says_what_to_do():
    with pytest.raises(LookupError, match=r"align\.attic\.chest has no place: write its package into ORDER"):
        package_of("align.attic.chest")


def test_the_picture_shows_what_the_packages_need():
    drawn = set(re.findall(r"<title>(\S+) needs (\S+)</title>", picture.PLACE.read_text(encoding="utf-8")))
    assert drawn == picture.needs(), "draw it anew: python -m tests.house.picture"


def test_nothing_in_the_picture_stands_left_of_the_diagonal():
    names = picture.packages()
    assert all(names.index(importer) < names.index(imported) for importer, imported in picture.needs())
