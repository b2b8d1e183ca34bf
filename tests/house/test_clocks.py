"""No test holds a span of time against a bound: how long something takes is the machine's affair, and its load's.

A test waits for an event instead. A limit that only catches a hang is a moment to give up at (`while clock() < end`).
"""

from __future__ import annotations

import ast

import pytest

from tests.house.source import ROOT

CLOCKS = {"monotonic", "perf_counter", "process_time", "thread_time", "time", "clock_gettime", "now", "utcnow"}
CLOCKS |= {f"{name}_ns" for name in CLOCKS}
FILES = sorted((ROOT / "tests").rglob("*.py"))


def _reads(node: ast.AST) -> bool:
    """Whether this is a call of a clock: `time.monotonic()`, `monotonic()`, `datetime.now()`."""
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    owner = getattr(node.func.value, "id", "") if isinstance(node.func, ast.Attribute) else "time"
    return name in CLOCKS and owner in ("time", "datetime")


def held_against_a_bound(tree: ast.AST) -> list[int]:
    """Lines that compare a difference of two readings, or what was made of one."""
    readings, spans = set(), set()

    def has(node: ast.AST, names: set[str], direct: bool) -> bool:
        parts = list(ast.walk(node))
        return any((direct and _reads(part)) or (isinstance(part, ast.Name) and part.id in names) for part in parts)

    def is_span(node: ast.AST) -> bool:
        parts = list(ast.walk(node))
        taken = [part for part in parts if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Sub)]
        return has(node, spans, False) or any(has(part, readings, True) for part in taken)

    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr)]
    for _ in range(3):  # a name may be made of another one
        for node in assigned:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            pairs = [(target, node.value) for target in targets]
            for target, value in list(pairs):
                if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                    pairs += zip(target.elts, value.elts, strict=False)
            for target, value in pairs:
                if isinstance(target, ast.Name) and value is not None:
                    spans.update([target.id] if is_span(value) else [])
                    readings.update([target.id] if _reads(value) else [])
    return sorted({node.lineno for node in ast.walk(tree) if isinstance(node, ast.Compare) and is_span(node)})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_span_of_time_is_held_against_a_bound(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert not [line for function in functions for line in held_against_a_bound(function)]


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("began = time.monotonic()\nassert time.monotonic() - began < 2", 2),
        ("rows, began = 1, time.process_time()\nmiddle = time.process_time()\nassert 1.5 > middle - began", 3),
        ("began = perf_counter()\ntook = perf_counter() - began\nassert took < 1", 3),
        ("took = round(time.time() - began)\nif took > 3:\n    raise ValueError", 2),
        ("asked = time.monotonic()\nassert float(said[2]) - asked < 1", 2),
    ],
)
def test_such_a_line_is_found(code, line):
    assert held_against_a_bound(ast.parse(code)) == [line]


@pytest.mark.parametrize(
    "code",
    [
        "end = time.monotonic() + 240\nwhile not done() and time.monotonic() < end:\n    pass",
        "assert entry['seconds'] > 0",
        "assert left - right < 1",
    ],
)
def test_a_moment_to_give_up_at_is_none(code):
    assert not held_against_a_bound(ast.parse(code))
