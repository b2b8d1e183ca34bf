"""Signal "python": a function of the user, by its dotted path, where the run allows it (`allow_code=true`).

    def score(prompts: list[list[dict]], replies: list[str], fields: list[dict]) -> list[float]

A prompt is its messages, {"role", "content"} each; `fields` have what is known of a row beside it: `id`, `finished`
(whether the reply ended by itself), and `ground_truth`, `topic` and `task` where the row has them. One call scores all
replies of an update on a process. Costs what the function costs.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.rl.signals.base import Said, Scorer, Site, Source, Verdict, checked, failed, kinds
from data_prep.core.errors import UserError
from data_prep.core.hashing import file_sha256
from data_prep.core.options import option

if TYPE_CHECKING:
    from data_prep.options import DataOptions


@kinds.register("python")
@dataclass
class PythonFunction(Source):
    """Scores replies by a function."""

    python: str = option("", "dotted path of a function of your own; needs allow_code=true")

    def require_allowed(self, where: str, allow_code: bool) -> None:
        """Nothing is imported unless the run says so."""
        if not allow_code:
            raise UserError(
                f"{self.python} is code of your own, which this run does not allow",
                code="code_not_allowed",
                field=where,
                hint="set allow_code=true to have it imported and called",
            )

    def check(self, where: str, data: DataOptions) -> None:
        """It can be imported, and takes prompts, replies and fields."""
        self._function(where)

    def contents(self, data: DataOptions) -> list[str]:
        """The file of the module that names it, and the one it is written in; what these import is not looked at."""
        function = inspect.unwrap(self._function(""))
        modules = (inspect.getmodule(function), import_module(self.python.rpartition(".")[0]))
        files = {str(file) for module in modules if (file := getattr(module, "__file__", None))}
        return sorted(file_sha256(Path(file)) for file in files)

    def open(self, where: str, site: Site) -> Scorer:
        """What calls it."""
        self.require_allowed(where, site.allow_code)
        function, who = self._function(where), f"the function {self.python}"

        def score(said: Said) -> list[Verdict]:
            try:
                found = list(function([row.messages for row in said.prompts], list(said.texts), said.fields()))
            except Exception as problem:
                raise failed(who, f"failed with {type(problem).__name__}: {problem}") from problem
            return checked(who, found, said)

        return score

    def _function(self, where: str) -> Callable[..., Any]:
        module, _, name = self.python.rpartition(".")
        if not module or not name:
            raise _refused(where, f"no dotted path of a function (got {self.python})", "as my_package.my_function")
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # as `python -m` has it, but behind what is installed
        try:
            found = getattr(import_module(module), name, None)
        except Exception as problem:
            said = f"{module} cannot be imported ({type(problem).__name__}: {problem})"
            raise _refused(where, said, f"it is looked for among installed packages and in {os.getcwd()}") from problem
        if not callable(found):
            raise _refused(where, f"{module} has no function {name}", "as my_package.my_function")
        try:
            inspect.signature(found).bind([], [], [])
        except TypeError as problem:
            said = f"{self.python} cannot be called with prompts, replies and fields ({problem})"
            raise _refused(where, said, "define it as my_function(prompts, replies, fields)") from problem
        except ValueError:
            pass  # it says nothing of what it takes
        return found  # type: ignore[no-any-return]


def _refused(where: str, said: str, hint: str) -> UserError:
    return UserError(said, code="bad_function", field=where, hint=hint)
