"""Recipes are plain data: nothing in them, or on the command line, can name code to run.

Hydra builds objects from `_target_` (and reads `_recursive_`, `_partial_`, ... beside it). Here methods, stages,
formats and rules are chosen by registered names alone, so such a key is refused wherever it stands, and of Hydra's own
settings only those that an installed launcher or sweeper has registered may have one. An interpolation may point at
another value, or ask for the environment (`${oc.env:NAME}`): its value is looked up when the recipe is composed and is
what `recipe.yaml` and the digest hold. Other resolvers, such as `${now:}`, would make every run another one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from data_prep.core.errors import UserError, nearest

RESOLVERS = ("oc.env", "oc.decode", "oc.select")
_BUILDS = re.compile(r"_[a-z]+_")
_BUILDS_INSIDE = re.compile(r"[{,]\s*_[a-z]+_\s*:")
_RESOLVER = re.compile(r"\$\{\s*([A-Za-z_][\w.]*)\s*:")


def check_plain(node: Any, path: str = "") -> None:
    """Refuse keys that would build objects and interpolations that would run something, anywhere below `node`.

    Args:
        node: mappings, lists and scalars, interpolations unresolved.
        path: dotted path of `node`, for the error.
    """
    if isinstance(node, dict):
        for key, value in node.items():
            where = f"{path}.{key}" if path else str(key)
            check_key(where)
            check_plain(value, where)
    elif isinstance(node, list):
        for item in node:
            check_plain(item, path)
    elif isinstance(node, str):
        check_resolvers(node, path)


def check_key(path: str) -> None:
    """Refuse a dotted path of which any part is a key like `_target_`.

    Raises:
        UserError: it is.
    """
    if any(_BUILDS.fullmatch(part) for part in path.split(".")):
        raise _builds(path)


def _builds(path: str) -> UserError:
    return UserError(
        "would build an object from an import path",
        field=path,
        code="target",
        hint="only registered names are built; `align ls` lists them",
    )


def check_word(text: str, path: str) -> None:
    """Refuse an override, as typed, with a key like `_target_` anywhere in its value, or an unknown resolver.

    Raises:
        UserError: it has one.
    """
    if _BUILDS_INSIDE.search(text):
        raise _builds(path)
    check_resolvers(text, path)


def check_resolvers(text: str, path: str) -> None:
    """Refuse interpolations like `${now:}`; `${seed}` and those of `RESOLVERS` are allowed.

    Raises:
        UserError: the text has another one.
    """
    for name in _RESOLVER.findall(text):
        if name not in RESOLVERS:
            near = nearest(name, RESOLVERS)
            guess = f"did you mean '{near}'? " if near else ""
            raise UserError(
                f"unknown resolver '{name}' ({guess}choices: {', '.join(RESOLVERS)})", field=path, code="resolver"
            )


def check_hydra(settings: DictConfig) -> None:
    """Refuse a recipe that makes Hydra build anything but a registered launcher or sweeper.

    Args:
        settings: the composed `hydra` node.

    Raises:
        UserError: a `_target_` that no plug-in has registered.
    """
    known = set(_targets(_registered(ConfigStore.instance().repo.get("hydra", {}))))
    for target in _targets(OmegaConf.to_container(settings, resolve=False)):
        if target not in known:
            raise UserError(
                f"would build '{target}'",
                field="hydra",
                code="target",
                hint="launchers and sweepers are chosen by name: hydra/launcher=joblib",
            )


def _registered(node: Any) -> Any:
    """The content of a folder of the ConfigStore."""
    if isinstance(node, dict):
        return {name: _registered(item) for name, item in node.items()}
    return OmegaConf.to_container(node.node, resolve=False)


def _targets(node: Any) -> Iterator[str]:
    """Every `_target_` below `node`."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield str(node["_target_"])
        for value in node.values():
            yield from _targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from _targets(value)
