"""Values that stand in rows as text: JSON, or what Python and numpy print of a list (pandas writes that into CSV)."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

_LIKE_MESSAGES = re.compile(r"""\s*(?:array\(\s*)?\[?\s*\{\s*(["'])(?:role|from|content|value)\1\s*:""")
_TEXT = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_BETWEEN = re.compile(rf"({_TEXT})|\}}(\s*)(?=\{{)", re.DOTALL)
_ARRAY = re.compile(rf"({_TEXT})|\barray\(|,\s*dtype=\w+\)|\)", re.DOTALL)


def value_of(text: str) -> Any:
    """The value that a text spells, in JSON or as Python prints it (numpy's arrays too).

    Raises:
        ValueError: it spells none; says what is wrong with it as JSON.
    """
    try:
        return json.loads(text)
    except RecursionError as problem:
        raise ValueError("nested too deeply") from problem
    except ValueError as problem:
        for spelt in (text, _with_commas(text)):
            try:
                return ast.literal_eval(spelt.strip())
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                continue
        raise ValueError(str(problem)) from problem


def like_messages(text: str) -> bool:
    """Whether a text begins as a spelled message or list of them does."""
    return _LIKE_MESSAGES.match(text) is not None


def _with_commas(text: str) -> str:
    """numpy prints arrays of objects as `[{...}\\n {...}]` or `array([...], dtype=object)`: the list that is meant."""
    if "array(" in text:
        text = _ARRAY.sub(lambda found: found[1] or "", text)
    return _BETWEEN.sub(lambda found: found[1] or f"}},{found[2]}", text)
