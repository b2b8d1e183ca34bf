"""Finding generators: modules of data_prep.generators with `version` and `rows(options)`, and plug-ins."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from data_prep.core.errors import unknown
from data_prep.core.registry import Registry
from data_prep.sources.files import Row
from data_prep.types import RowKind

PACKAGE = "data_prep.generators"
GENERATORS: Registry[Any] = Registry("generator", None)


def find_generator(name: str) -> Any:
    """The generator called `name`: an object with `version`, `rows(options)` and maybe `text(options)`.

    Raises:
        UserError: no such generator; the nearest one is offered.
    """
    found: dict[str, Any] = dict(GENERATORS.items())
    for info in pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__):
        module = importlib.import_module(f"{PACKAGE}.{info.name}")
        if hasattr(module, "version") and hasattr(module, "rows"):
            found.setdefault(info.name, module)
    if name not in found:
        raise unknown("generator", name, found)
    return found[name]


def generated_rows(name: str, options: dict[str, Any], kind: RowKind | None) -> list[Row]:
    """The rows of a generator; documents as rows with a column `text`."""
    generator = find_generator(name)
    if kind == RowKind.text and hasattr(generator, "text"):
        return [Row(name, number, {"text": text}) for number, text in enumerate(generator.text(options), start=1)]
    return [Row(name, number, dict(row)) for number, row in enumerate(generator.rows(options), start=1)]
