"""The project's source as syntax trees, for the tests of the house rules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("data_prep", "reward", "align", "recipes")
"""The top packages; tests/house/order.py has the order of all packages."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One source file."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def shown(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def lines(self) -> int:
        return len(self.path.read_text(encoding="utf-8").splitlines())


@cache
def modules() -> tuple[Module, ...]:
    """Every module of the project's packages."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append(Module(name, path, ast.parse(path.read_text(encoding="utf-8"))))
    return tuple(found)


def functions(module: Module) -> Iterator[tuple[str, Function, bool]]:
    """(qualified name, function, whether it is defined in a class) of functions outside other functions."""

    def walk(body: list[ast.stmt], prefix: str, in_class: bool) -> Iterator[tuple[str, Function, bool]]:
        for node in body:
            if isinstance(node, Function):
                yield f"{prefix}{node.name}", node, in_class
            elif isinstance(node, ast.ClassDef):
                yield from walk(node.body, f"{prefix}{node.name}.", True)

    yield from walk(module.tree.body, "", False)


def imports(module: Module) -> set[str]:
    """Dotted names imported when the module is imported (not inside functions, not for type checkers)."""
    names: set[str] = set()

    def walk(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.Import):
                names.update(item.name for item in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module)
                names.update(f"{node.module}.{item.name}" for item in node.names)
            elif isinstance(node, ast.If):
                if "TYPE_CHECKING" not in ast.dump(node.test):
                    walk(node.body)
                walk(node.orelse)
            elif isinstance(node, ast.Try):
                walk([*node.body, *node.orelse, *node.finalbody])
                for handler in node.handlers:
                    walk(handler.body)
            elif isinstance(node, ast.With | ast.ClassDef):
                walk(node.body)

    walk(module.tree.body)
    return names


@cache
def graph() -> dict[str, frozenset[str]]:
    """Module -> modules of the project that it imports when it is imported."""
    known = {module.name for module in modules()}
    return {module.name: frozenset((imports(module) & known) - {module.name}) for module in modules()}


@cache
def reachable(name: str) -> frozenset[str]:
    """The modules that importing `name` imports, itself and its packages included."""
    known, seen, todo = graph(), set(), [name]
    while todo:
        here = todo.pop()
        if here in seen or here not in known:
            continue
        seen.add(here)
        todo.extend(known[here])
        todo.append(here.rpartition(".")[0])
    return frozenset(seen)
