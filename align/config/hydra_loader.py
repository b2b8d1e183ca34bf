"""Hydra behind one door: the recipes' groups, composing them, and its errors as one line.

No other file imports what is private to Hydra; `tests/align/config/test_hydra_private.py` fails when Hydra moves it.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.resources
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import version as hydra_version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.defaults_list import DefaultsList, create_defaults_list
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigKeyError, InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from align.config.foreign_names import unknown_choice
from align.config.registries import adapters, stages
from align.config.safe_values import check_hydra
from data_prep.core.errors import UserError, unknown
from data_prep.core.options import convert, option_types, shown, unknown_key


class _Files(ConfigRepository):
    """Hydra's sources, of which each file is read once; who asks gets a copy, because composing merges into it."""

    def __init__(self, search_path: ConfigSearchPath) -> None:
        super().__init__(search_path)
        self._read: dict[str, ConfigResult | None] = {}

    def load_config(self, config_path: str) -> ConfigResult | None:
        if config_path not in self._read:
            self._read[config_path] = super().load_config(config_path)
        return copy.deepcopy(self._read[config_path])


class Loader(ConfigLoaderImpl):
    """Hydra's loader, which reads a file and composes a choice once, however often they are asked for.

    It goes through what is private to Hydra, because the public call composes anew each time, Hydra's own settings
    included: half of what every configuration error had to wait for.
    """

    def __init__(self, search_path: ConfigSearchPath) -> None:
        super().__init__(search_path)
        self.repository = _Files(search_path)
        self._found: dict[tuple[str, tuple[str, ...]], tuple[DefaultsList, DictConfig]] = {}

    def found(self, config: str, overrides: Sequence[str]) -> tuple[DefaultsList, DictConfig]:
        """The recipes that a choice composes, in order, and what they come to; of Hydra's settings the recipes' own."""
        key = (config, tuple(overrides))
        if key not in self._found:
            parsed, files = self._parse_overrides_and_create_caching_repo(config, list(overrides))
            listed = create_defaults_list(files, config, parsed, prepend_hydra=True, skip_missing=False)
            own = [item for item in listed.defaults if not str(item.config_path).startswith("hydra/")]
            self._found[key] = listed, self._compose_config_from_defaults_list(own, files)
        return self._found[key]

    def compose(self, config: str, overrides: Sequence[str]) -> tuple[DictConfig, dict[str, Any]]:
        """What a choice composes, for the caller to change, and the choice that each group took."""
        listed, composed = self.found(config, overrides)
        tree = copy.deepcopy(composed)
        OmegaConf.set_struct(tree, True)
        return tree, {str(group): choice for group, choice in listed.overrides.known_choices.items()}


def loader() -> Loader:
    """The loader of the recipes that are set up (inside `recipes`)."""
    found = GlobalHydra.instance().config_loader()
    assert isinstance(found, Loader), "called outside recipes()"
    return found


def recipes_place() -> str:
    """Where Hydra finds the project's recipes: the installed package, or the folder of a bare source tree."""
    if importlib.util.find_spec("align.recipes") is not None:
        return "pkg://align.recipes"
    return str(Path(__file__).resolve().parent.parent.parent / "recipes")


@cache
def _own_loader(place: str) -> Loader:
    """The loader of the project's recipes alone, which stay as they are while a process runs."""
    return Loader(create_config_search_path(place))


@contextmanager
def recipes(config_dir: str | None) -> Iterator[None]:
    """Hydra set up over the project's recipes and the user's folder; what was set up before comes back after.

    Raises:
        UserError: `config_dir` is not a folder, or has a group `hydra`.
    """
    adapters.load()
    stages.load()
    loads = _own_loader(recipes_place())
    if config_dir is not None:
        folder = Path(config_dir).absolute()
        if not folder.is_dir():
            raise UserError(f"no such folder: {config_dir}", field="--config-dir", code="no_folder")
        if (folder / "hydra").exists():
            raise UserError(
                "a folder of recipes cannot bring settings of Hydra", file=str(folder / "hydra"), code="bad_recipe"
            )
        search_path = create_config_search_path(recipes_place())
        search_path.prepend("command-line", f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
        loads = Loader(search_path)
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    hydra_version.setbase("1.3")
    try:
        GlobalHydra.instance().initialize(Hydra("align", loads))
        yield
    finally:
        GlobalHydra.instance().clear()
        GlobalHydra.instance().hydra = before


def group_choices(group: str) -> list[str]:
    """The names in a config group, the user's own included (inside `recipes`)."""
    return _listed(group, ObjectType.CONFIG)


def recipe_comment(group: str, name: str) -> str:
    """The first comment of a recipe's file, package line aside; empty where it has no file (inside `recipes`)."""
    found = recipe_file(f"{group}/{name}")
    if found is None:
        return ""
    comments = [line.lstrip("# ").strip() for line in found.read_text("utf-8").splitlines() if line.startswith("#")]
    return next((line for line in comments if not line.startswith("@package")), "")


def recipe_file(name: str) -> Path | None:
    """The file of a recipe (`config`, `data/persona`), the user's before the project's (inside `recipes`)."""
    for source in loader().get_sources():
        if source.scheme() in ("file", "pkg") and source.is_config(name):
            return _folder(source.scheme(), source.path) / f"{name}.yaml"
    return None


def defaults_of(config: str, overrides: Sequence[str]) -> list[tuple[str, str]]:
    """(recipe, dotted place in the tree) of everything that a choice composes, in order (inside `recipes`)."""
    with explained():
        found, _ = loader().found(config, overrides)
    return [
        (str(item.config_path), str(item.package or "").removeprefix("_global_").lstrip("."))
        for item in found.defaults
        if item.config_path and not item.config_path.startswith("hydra/")
    ]


def _folder(scheme: str, path: str) -> Path:
    """The folder of a Hydra config source."""
    if scheme == "file":
        return Path(path)
    return Path(str(importlib.resources.files(path)))


@dataclass
class Composition:
    """What Hydra put together, and the choice that each group took."""

    tree: DictConfig
    choices: dict[str, Any]
    swept: dict[str, str] = field(default_factory=dict)
    """Lists of values that a recipe brings for `-m`, as Hydra writes them: `hydra.sweeper.params`."""
    repeats: dict[str, str] = field(default_factory=dict)
    """Stages that options have asked for -> the stage of which each repeats the options."""

    def change(self, overrides: Sequence[str]) -> None:
        """Apply overrides of values (not of groups), given in Hydra's own form, in Hydra's own way."""
        with explained():
            # Private to Hydra, but it is the one place that knows what an override means; composing twice costs double.
            ConfigLoaderImpl._apply_overrides_to_config(
                OverridesParser.create().parse_overrides(list(overrides)), self.tree
            )

    def lengthen(self, stages: Mapping[str, tuple[str, dict[str, Any]]]) -> None:
        """Bring the stages into this order; those that are new have (registered name, options)."""
        with open_dict(self.tree):
            nodes = self.tree.stages
            for name, (kind, options) in stages.items():
                held = nodes.pop(name) if name in nodes else None
                nodes[name] = options if held is None else held
                self.choices.setdefault(f"stage@stages.{name}", kind)

    def content(self) -> dict[str, Any]:
        """Plain data, interpolations unresolved."""
        content = OmegaConf.to_container(self.tree, resolve=False, enum_to_str=True)
        assert isinstance(content, dict)
        return {str(key): value for key, value in content.items()}


def compose_choices(config: str, overrides: Sequence[str]) -> Composition:
    """Hydra's composition (inside `recipes`).

    Args:
        config: name of the primary configuration: `config`, or `adapter/mine` for one preset.
        overrides: in Hydra's own form.
    """
    with explained():
        tree, choices = loader().compose(config, overrides)
    swept: dict[str, str] = {}
    if "hydra" in tree:
        check_hydra(tree.hydra)
        params = OmegaConf.select(tree, "hydra.sweeper.params") or {}
        swept = {str(key): str(value) for key, value in params.items()}
        with open_dict(tree):
            del tree["hydra"]
    return Composition(tree, choices, swept)


def preset(group: str, name: str, where: str) -> dict[str, Any]:
    """The content of one choice of a group, interpolations unresolved.

    Raises:
        UserError: the group has no such choice; `where` (`stages.sft`) is named.
    """
    choices = group_choices(group)
    if name not in choices:
        problem = unknown_choice(group, name, choices)
        raise UserError(problem.message, hint=problem.hint, field=f"{where}.{group}", code=problem.code)
    content = compose_choices(f"{group}/{name}", []).content().get(group)
    if not isinstance(content, dict):
        raise UserError(f"the {group} preset '{name}' is not a mapping", field=f"{where}.{group}", code="bad_recipe")
    return content


def combinations(given: Sequence[Override]) -> list[list[str]]:
    """The overrides of every job that overrides with lists of values stand for, in the order of Hydra's own sweeper."""
    return [list(words) for batch in BasicSweeper.split_arguments(list(given), None) for words in batch]


def resolved(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with every `${...}` replaced by its value.

    Raises:
        UserError: an interpolation that points nowhere, or a value left as `???`.
    """
    if not _has_marks(tree):
        return tree
    with explained():
        content = OmegaConf.to_container(OmegaConf.create(tree), resolve=True, throw_on_missing=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _has_marks(node: Any) -> bool:
    """Whether there is anything for OmegaConf to resolve, or to miss."""
    if isinstance(node, dict):
        return any(_has_marks(value) for value in node.values())
    if isinstance(node, list):
        return any(map(_has_marks, node))
    return isinstance(node, str) and ("${" in node or node == "???")


@contextmanager
def explained() -> Iterator[None]:
    """Turn what Hydra, OmegaConf and YAML raise into one line for the user."""
    try:
        yield
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark
        raise UserError(
            f"not valid YAML: {problem.problem or 'cannot be read'}",
            file=_shown_file(mark.name) if mark else None,
            row=mark.line + 1 if mark else None,
            code="bad_recipe",
        ) from problem
    except (HydraException, OmegaConfBaseException) as problem:
        raise _explain(problem) from problem


def _explain(problem: Exception) -> UserError:
    """The user's version of an exception of Hydra or OmegaConf."""
    if isinstance(problem, MissingConfigException) and problem.missing_cfg_file:
        group, _, name = str(problem.missing_cfg_file).rpartition("/")
        options = problem.options or []
        better = unknown(f"{group} recipe" if group else "recipe", name, options)
        if group and not options:
            groups = [each for each in _groups() if not each.startswith("hydra")]
            better = unknown("group", group, groups)
        better.field = group or None
        return better
    cause = problem if isinstance(problem, OmegaConfBaseException) else problem.__cause__ or problem.__context__
    if isinstance(cause, OmegaConfBaseException):
        return _explain_node(cause)
    outer = next((name for name in ("experiment", "pipeline") if f"@{name}." in str(problem)), None)
    hint = f"a file of the group {outer} must begin with the line '# @package _global_'" if outer else None
    return UserError(_first_line(problem), code="bad_recipe", hint=hint)


def _groups() -> list[str]:
    """The config groups that recipes can choose from."""
    return _listed("", ObjectType.GROUP)


def _listed(group: str, kind: ObjectType) -> list[str]:
    """The configs or groups inside `group`. Hydra's own call copies all sources first."""
    return [str(name) for name in loader().repository.get_group_options(group, kind)]


def _explain_node(problem: OmegaConfBaseException) -> UserError:
    """The user's version of an exception about one node of the configuration."""
    path = str(problem.full_key or problem.key or "")
    owner = problem.object_type
    if variable := re.search(r"Environment variable '([^']+)' not found", str(problem)):
        return UserError(f"the environment variable {variable[1]} is not set", field=path or None, code="bad_recipe")
    if isinstance(problem, InterpolationKeyError):
        return UserError(_first_line(problem), field=path or None, code="bad_recipe")
    if isinstance(problem, MissingMandatoryValue):
        return UserError("needs a value", field=path, code="missing_value", hint=f"add {path}=VALUE")
    if dataclasses.is_dataclass(owner) and isinstance(owner, type):
        hints = option_types(owner)
        if isinstance(problem, (ConfigKeyError, AttributeError)):
            return unknown_key(path, hints)
        try:
            meant = convert(hints[path.rpartition(".")[2]], problem.value, path)
        except (UserError, KeyError) as better:
            if isinstance(better, UserError):
                return better
        else:
            return UserError(f"write {shown(meant)} (got {shown(problem.value)})", field=path, code="bad_value")
    return UserError(f"{_first_line(problem)} (got {shown(problem.value)})", field=path or None, code="bad_value")


def _first_line(problem: Exception) -> str:
    return str(problem).strip().split("\n")[0]


def _shown_file(name: str) -> str:
    """The file of a YAML mark as the user knows it."""
    return name.removeprefix("file://")
