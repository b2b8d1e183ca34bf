"""Every error line that docs/troubleshooting.md explains is one that the code says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.docs.pages import ROOT, pages

RAISED = {"UserError", "TrainingStopped", "__init__"}
"""What is called with a message as its first argument; `__init__`: of an error's own class."""
HOLE = "\0"


def messages() -> Iterator[str]:
    """The messages of errors as the source has them, a HOLE for each value put in."""
    for part in ("align", "data_prep", "reward"):
        for path in (ROOT / part).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and node.args:
                    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                    if name in RAISED:
                        yield text_of(node.args[0])


def text_of(node: ast.expr) -> str:
    """The text of an expression: literal parts, and a HOLE for everything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return HOLE


def lines() -> list[str]:
    """The first cells of the page's tables."""
    page = next(page for page in pages() if page.shown == "docs/troubleshooting.md")
    return re.findall(r"^\| `([^`]+)` \|", page.text, re.MULTILINE)


@pytest.fixture(scope="module")
def said() -> list[str]:
    return [message for message in messages() if message.strip(HOLE)]


@pytest.mark.parametrize("line", lines())
def test_the_line_is_one_that_the_code_says(line, said):
    pattern = re.compile(".*".join(re.escape(part) for part in line.split("...")), re.DOTALL)
    assert any(pattern.fullmatch(message) for message in said), "no error has such a message"


def test_the_likely_lines_are_there_each_once():
    assert len(lines()) >= 20 and len(set(lines())) == len(lines())


def test_a_line_that_nobody_says_is_seen(said):
    assert not any(re.fullmatch("no such file and folder.*", message) for message in said)
