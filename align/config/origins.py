"""Where each value of a composed recipe was set: a line of a recipe's file, the command line, or a default.

Nothing is traced while recipes are composed. The same choices are read once more, with their lines, when somebody
asks: `align show`, and every configuration error.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra.core.override_parser.types import Override

from align.config.hydra_loader import defaults_of, recipe_file, recipes_place
from align.config.overrides import COMMAND_LINE, GROUPS, NAMES, first_choice, is_group, raw_value
from data_prep.core.errors import UserError

if TYPE_CHECKING:
    from align.config.schema import RunConfig


@dataclass(frozen=True)
class Place:
    """Where a value was written, and what stands there (None for a mapping)."""

    file: str
    row: int | None = None
    text: str | None = None

    def __str__(self) -> str:
        return self.file if self.row is None else f"{self.file}:{self.row}"


Places = dict[str, Place]


@dataclass(frozen=True)
class Origins:
    """The places of one composition, found while its recipes are still set up."""

    places: Places
    presets: dict[tuple[str, str], Places]

    def place(self, path: str) -> Place | None:
        """Where the option at a dotted path was set; None for a default."""
        path = re.sub(r"\[\d+\]", "", path)
        stage, group, rest = _own_option(path)
        found = self.places.get(path)
        if group is None:
            return found or self._choice(path)
        named = self.places.get(f"{stage}.{group}.{NAMES[group]}")
        if found is not None:
            return found
        if named is not None and named.text is not None:
            return self.presets.get((group, named.text), {}).get(rest)
        return self.place(rest)

    def _choice(self, path: str) -> Place | None:
        """A method has no line of its own: the choice of the adapter decided it."""
        group, _, key = path.partition(".")
        return self.places.get(group) if key and NAMES.get(group) == key else None


def origins(given: Sequence[Override]) -> Origins:
    """Where the values of the recipes and overrides come from (inside `recipes`)."""
    places = _of_files("config", [first_choice(item) for item in given if is_group(item)])
    for item in given:
        key = item.key_or_group
        if is_group(item):
            places[key] = Place(COMMAND_LINE, text=raw_value(item))
            continue
        value = None if item.is_delete() or item.is_sweep_override() else item.value()
        parts = key.split(".")
        if len(parts) == 3 and parts[2] in NAMES and isinstance(value, str):
            key = f"{key}.{NAMES[parts[2]]}"
        for path in [path for path in places if path == key or path.startswith(f"{key}.")]:
            if not isinstance(value, dict):
                del places[path]
        _spread(places, key, value)
    presets: dict[tuple[str, str], Places] = {}
    for path, place in list(places.items()):
        group = path.split(".")[-2] if path.count(".") == 3 else ""
        if path.startswith("stages.") and path.endswith(f".{NAMES.get(group)}") and place.text is not None:
            with suppress(UserError):  # no such preset: the error at hand is about it
                presets[group, place.text] = _of_files(f"{group}/{place.text}", [])
    return Origins(places, presets)


def _spread(places: Places, key: str, value: Any) -> None:
    """Everything below an override was set on the command line."""
    places[key] = Place(COMMAND_LINE, text=None if isinstance(value, dict) else str(value))
    if isinstance(value, dict):
        for name, item in value.items():
            _spread(places, f"{key}.{name}", item)


def _own_option(path: str) -> tuple[str, str | None, str]:
    """(stages.sft, adapter, adapter.rank) of `stages.sft.adapter.rank`; no group where it is no such option."""
    parts = path.split(".")
    if len(parts) > 3 and parts[0] == "stages" and parts[2] in NAMES:
        return ".".join(parts[:2]), parts[2], ".".join(parts[2:])
    return "", None, path


def _of_files(config: str, chosen: Sequence[str]) -> Places:
    """The lines of every recipe file that the choices compose; later files replace what earlier ones set."""
    places: Places = {}
    for name, package in defaults_of(config, chosen):
        path = recipe_file(name)
        if path is not None:
            for key, place in places_of(path, package).items():
                _put(places, key, place)
    return places


def places_of(path: Path, package: str = "") -> Places:
    """The lines of one recipe's file, whose content stands at the dotted path `package`; choices by their group."""
    places: Places = {}
    node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    if isinstance(node, yaml.MappingNode):
        _read(places, node, package.split(".") if package else [], shown_file(path))
    return places


def _read(places: Places, node: yaml.MappingNode, above: list[str], file: str) -> None:
    """The lines of a mapping's keys."""
    for key, value in node.value:
        row = key.start_mark.line + 1
        if key.value == "<<" and isinstance(value, yaml.MappingNode):
            _read(places, value, above, file)
        elif key.value == "defaults" and isinstance(value, yaml.SequenceNode):
            _read_choices(places, value, file)
        else:
            path = [*above, str(key.value)]
            _put(places, ".".join(path), Place(file, row, _text(value)))
            if isinstance(value, yaml.MappingNode):
                _read(places, value, path, file)


def _text(node: yaml.Node) -> str | None:
    """What a value says; None for a mapping, whose keys have places of their own."""
    if isinstance(node, yaml.MappingNode):
        return None
    return str(node.value) if isinstance(node, yaml.ScalarNode) else "[]"


def _put(places: Places, path: str, place: Place) -> None:
    """Note a place; a mapping adds to what was chosen before it, and anything else replaces it."""
    if place.text is not None or path not in places:
        places[path] = place


def _read_choices(places: Places, node: yaml.SequenceNode, file: str) -> None:
    """The lines where a recipe chooses from groups; `/stage@stages.sft: ppo` decides `stages.sft.stage`."""
    for item in node.value:
        for key, value in item.value if isinstance(item, yaml.MappingNode) else ():
            group, _, package = key.value.removeprefix("override ").lstrip("/").partition("@")
            path = f"{package}.{group}" if package else group
            places[path] = Place(file, key.start_mark.line + 1, str(value.value))


def shown_file(path: Path) -> str:
    """A recipe's file as the user knows it: below `recipes/` for the project's own, else from the current folder."""
    own = recipes_place()
    for folder in (Path(own), Path(__file__).resolve().parent.parent.parent / "recipes"):
        if folder.is_absolute() and path.is_relative_to(folder):
            return f"recipes/{path.relative_to(folder).as_posix()}"
    if path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return str(path)


@contextmanager
def located(given: Sequence[Override]) -> Iterator[None]:
    """Add to an error about an option where it was set (inside `recipes`)."""
    try:
        yield
    except UserError as problem:
        if problem.field is not None:
            problem.field = problem.field.rstrip("_")  # lambda, which Python keeps for itself
        if problem.field is not None and problem.file is None and problem.code != "missing_value":
            try:
                place = origins(given).place(problem.field)
            except UserError:  # the recipes do not compose at all
                place = _choice_of(problem.field, given)
            if place is not None:
                problem.file, problem.row = place.file, place.row
        raise


def _choice_of(group: str, given: Sequence[Override]) -> Place | None:
    """Where a choice from `group` stands that does not exist: on the command line, or in a recipe chosen there."""
    chosen = [item for item in given if is_group(item)]
    if any(item.key_or_group == group for item in chosen):
        return Place(COMMAND_LINE)
    paths = [path for item in chosen for path in files_of(f"{item.key_or_group}/{raw_value(item)}").values()]
    return next((place for path in paths if (place := places_of(path).get(group))), None)


def files_of(recipe: str) -> dict[str, Path]:
    """The files of a recipe `group/name` and of the recipes that it chooses, by name (inside `recipes`)."""
    found: dict[str, Path] = {}
    waiting = [recipe]
    while waiting:
        name = waiting.pop()
        path = recipe_file(name)
        if path is not None and name not in found:
            found[name] = path
            chosen = [(group, place.text) for group, place in places_of(path).items() if group in GROUPS]
            waiting += [f"{group}/{choice}" for group, choice in reversed(chosen) if choice]
    return found


def told_origins(config: RunConfig, found: Origins) -> dict[str, str]:
    """Option -> where its value comes from, for every value of the resolved recipe."""
    values = dict(value_paths(config.resolved))
    told = {path: str(found.place(path) or _repeated(config, values, path, found)) for path in values}
    name = found.place("name")
    if name is None or name.text == "null":
        told["name"] = "the pipeline and the digest of all that decides the result"
    return told


def _repeated(config: RunConfig, values: dict[str, Any], path: str, found: Origins) -> str:
    """Where a value comes from that nobody set at this path: a stage that was added has it from the one it repeats."""
    stages, _, rest = path.partition(".")
    name, _, rest = rest.partition(".")
    source = config.repeats.get(name) if stages == "stages" else None
    if source is None:
        return _default(config, path)
    other = f"stages.{source}.{rest}"
    if values[path] == values.get(other) and (place := found.place(other)) is not None:
        return str(place)
    default = _default(config, path)
    return default if values[path] == values.get(other) else f"{default}, or of what adds {name}"


def value_paths(node: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything in a recipe; a list or an empty mapping is one value."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from value_paths(value, f"{above}.{key}" if above else str(key))
    else:
        yield above, node


def _default(config: RunConfig, path: str) -> str:
    """What a value that nobody set is a default of: the innermost options that have it."""
    parts = path.split(".")
    here: Any = config
    if parts[0] == "stages":
        spec = next(spec for spec in config.stages if spec.name == parts[1])
        here, parts = (getattr(spec, parts[2]), parts[3:]) if parts[2] in NAMES else (spec.stage, parts[2:])
    elif hasattr(config, parts[0]) and dataclasses.is_dataclass(getattr(config, parts[0])):
        here, parts = getattr(config, parts[0]), parts[1:]
    else:
        return "default of the run"
    for part in parts[:-1]:
        inner = getattr(here, part, None)
        here = inner if dataclasses.is_dataclass(inner) else here
    return f"default of {type(here).__name__}"
