"""Names to classes. One file that registers itself is all that an extension needs.

The modules of the registry's package are imported on the first look-up, and so are the entry points of the
group `align.plugins`, so that packages outside this repository can register too.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from importlib import metadata
from typing import Any, Generic, TypeVar, cast

from data_prep.core.errors import UserError, unknown

T = TypeVar("T")
C = TypeVar("C")
PLUGIN_GROUP = "align.plugins"
_plugins: dict[str, bool] = {"loaded": False}


def load_plugins() -> None:
    """Import every entry point of the group `align.plugins`, once per process.

    Raises:
        UserError: a plug-in cannot be imported (it is named, with the reason).
    """
    if _plugins["loaded"]:
        return
    _plugins["loaded"] = True
    for point in metadata.entry_points(group=PLUGIN_GROUP):
        try:
            point.load()
        except Exception as problem:
            _plugins["loaded"] = False
            raise UserError(
                f"the plug-in '{point.name}' ({point.value}) cannot be imported: {problem}",
                code="plugin",
                hint="mend or uninstall it",
            ) from problem


class Registry(Generic[T]):
    """A table of named choices of one kind, filled by the decorator `register`.

    Args:
        kind: the word for error messages: "format", "adapter".
        package: dotted name of the package whose modules register themselves; None: nothing is imported.
    """

    def __init__(self, kind: str, package: str | None) -> None:
        self.kind = kind
        self.package = package
        self._choices: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[C], C]:
        """Decorator: store the class (or function) under `name` and set its attribute `name`.

        Raises:
            ValueError: the name is taken by another object.
        """

        def add(choice: C) -> C:
            held = self._choices.get(name)
            if held is not None and _place(held) != _place(choice):
                raise ValueError(f"{self.kind} '{name}' is registered twice: {_place(held)} and {_place(choice)}")
            cast(Any, choice).name = name
            self._choices[name] = cast(T, choice)
            return choice

        return add

    def load(self) -> None:
        """Import the package's modules and the plug-ins, once."""
        if self._loaded:
            return
        self._loaded = True
        try:
            if self.package is not None:
                package = importlib.import_module(self.package)
                for module in pkgutil.iter_modules(package.__path__):
                    if not module.name.startswith("_"):
                        importlib.import_module(f"{self.package}.{module.name}")
            load_plugins()
        except BaseException:
            self._loaded = False
            raise

    def get(self, name: str) -> T:
        """The choice called `name`.

        Raises:
            UserError: no such name; the nearest one is offered.
        """
        self.load()
        if name not in self._choices:
            raise unknown(self.kind, name, self._choices)
        return self._choices[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        self.load()
        return sorted(self._choices)

    def items(self) -> list[tuple[str, T]]:
        """All (name, choice) pairs, sorted by name."""
        return [(name, self._choices[name]) for name in self.names()]


def _place(choice: object) -> str:
    """Where an object was defined, so that a reloaded module may register again."""
    return f"{getattr(choice, '__module__', '?')}.{getattr(choice, '__qualname__', choice)}"
