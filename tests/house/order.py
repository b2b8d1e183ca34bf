"""The order of the packages, and what the imports of the project say about it: which run up, which go in circles.

An import is one wherever it stands: at the top of a file, inside a function, for type checkers alone, or as a string
that names a module (`"align.cli.run:run"`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from tests.house.source import Module, modules

ORDER: tuple[tuple[str, ...], ...] = (
    ("recipes",),
    ("align.cli",),
    ("align",),
    ("align.sweeps",),
    ("align.pipeline",),
    ("align.runs", "align.planning", "align.weights"),
    ("align.stages",),
    ("align.rl", "align.serving", "align.evaluation"),
    ("align.training", "align.inference"),
    ("align.roles",),
    ("align.checkpoints",),
    ("align.adapters",),
    ("align.models",),
    ("align.report", "align.tracking"),
    ("align.config", "align.functional", "align.run_record"),
    ("reward.quality",),
    ("reward.gate", "reward.head", "reward.loss", "reward.metrics", "reward.probes", "reward.rules", "reward.shaping"),
    ("data_prep.tools",),
    ("data_prep.prepare", "data_prep.filters"),
    ("data_prep.records",),
    ("data_prep.formats", "data_prep.generators", "data_prep.rendering", "data_prep.quality"),
    ("data_prep.sources", "data_prep.splitting"),
    ("data_prep.options",),
    ("data_prep.types", "data_prep.core"),
)
"""From the top down: an import goes to a lower line or stays in its own package. Names of a line know nothing of each
other. `align` is its `__init__.py`, the public API."""
ROOMS = ("align", "reward", "data_prep")
"""Top packages whose own `__init__.py` is no room for other files: everything in them has a place by its own name."""
FOLDERS = {
    "align.adapters",
    "align.rl.signals",
    "align.stages",
    "align.tracking.trackers",
    "reward.rules",
    "data_prep.filters",
    "data_prep.formats",
    "data_prep.generators",
}
"""Folders of files that register themselves. A registry names its folder and knows none of the files, so that the
name of such a folder as a string is no import."""


@dataclass(frozen=True, order=True)
class Import:
    """`importer` needs `imported`, as its line says."""

    importer: str
    imported: str
    line: int


def package_of(name: str) -> str:
    """The entry of `ORDER` that a module belongs to.

    Raises:
        LookupError: it has none.
    """
    entries = [entry for line in ORDER for entry in line]
    fitting = [each for each in entries if name == each or (name.startswith(f"{each}.") and each not in ROOMS)]
    if name in ("reward", "data_prep"):  # empty __init__.py files
        return name
    if not fitting:
        raise LookupError(f"{name} has no place: write its package into ORDER of tests/house/order.py")
    return max(fitting, key=len)


def height(name: str) -> int:
    """How many lines of `ORDER` stand below a module's."""
    package = package_of(name)
    return next((len(ORDER) - at for at, line in enumerate(ORDER) if package in line), 0)


def imports_of(module: Module, known: Mapping[str, Module] | None = None) -> list[Import]:
    """The modules of the project that a module needs, with the lines that say so."""
    known = {each.name: each for each in modules()} if known is None else known
    found = {Import(module.name, name, line) for name, line in _named(module, known) if name != module.name}
    return sorted(found)


def _named(module: Module, known: Mapping[str, Module]) -> Iterator[tuple[str, int]]:
    """(project module, line) of every name of one in the syntax tree."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                yield from ((name, node.lineno) for name in [_longest(item.name, known)] if name)
        elif isinstance(node, ast.ImportFrom):
            where = _absolute(module, node)
            for item in node.names:
                yield from ((name, node.lineno) for name in [_longest(f"{where}.{item.name}", known)] if name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.partition(":")[0]
            if "." in name and name in known and name not in FOLDERS:
                yield name, node.lineno


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    """The module that `from ... import` names, in full."""
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    here = parts if module.path.name == "__init__.py" else parts[:-1]
    above = here[: len(here) - node.level + 1]
    return ".".join([*above, *([node.module] if node.module else [])])


def _longest(name: str, known: Mapping[str, Module]) -> str | None:
    """The module that a dotted name begins with: `align.pipeline.run` is of `align.pipeline`."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


@cache
def all_imports() -> tuple[Import, ...]:
    """Every import of one file of the project by another."""
    return tuple(each for module in modules() for each in imports_of(module))


def imports_up(imports: tuple[Import, ...]) -> list[Import]:
    """Imports that go to a line above, or to another package of the same line."""
    return [
        each
        for each in imports
        if package_of(each.importer) != package_of(each.imported) and height(each.importer) <= height(each.imported)
    ]


def circles(imports: tuple[Import, ...]) -> list[list[str]]:
    """Groups of modules each of which needs all the others, directly or not."""
    edges: dict[str, set[str]] = {}
    for each in imports:
        edges.setdefault(each.importer, set()).add(each.imported)
        edges.setdefault(each.imported, set())
    reach = {name: _reachable(name, edges) for name in edges}
    found = {frozenset(other for other in reach[name] if name in reach[other]) for name in edges}
    return sorted(sorted(group) for group in found if group)


def _reachable(name: str, edges: Mapping[str, set[str]]) -> set[str]:
    """What a module needs, directly or not; itself only where a way leads back."""
    seen: set[str] = set()
    todo = list(edges[name])
    while todo:
        here = todo.pop()
        if here not in seen:
            seen.add(here)
            todo.extend(edges[here])
    return seen
