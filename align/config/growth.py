"""Stages that options of other stages ask for: `stages.ppo.refresh=1` makes the chain longer by two.

Recipes list the stages of a chain; a stage's class says which more its options stand for (`Stage.lengthened`). They are
put in before overrides are applied, with the options of the stages that they repeat, so that they have names and
options of their own like any other: `stages.ppo_2.kl_coef=0.1`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra.core.override_parser.types import Override

from align.config.hydra_loader import Composition
from align.config.overrides import Landscape, first_choice, is_group, parse, rewrite
from data_prep.core.errors import UserError

Tree = dict[str, Any]


@dataclass(frozen=True)
class Link:
    """A stage of a chain that is still being composed: its registered dataclass, and its options as written."""

    kind: Any
    options: Tree
    repeats: str = ""
    """The stage of the recipe whose options it has where nothing else is said."""


Chain = Mapping[str, Link]
"""The stages of a run by name, in order."""


def grown(composition: Composition, land: Landscape, given: Sequence[Override]) -> Chain:
    """The stages of a composition with those that its recipes and the overrides ask for.

    Raises:
        UserError: what is asked for cannot be.
    """
    tree = composition.content()
    if any(_asks(item, land) for item in given):
        trial = replace(composition, tree=copy.deepcopy(composition.tree))
        trial.change(rewrite(_applicable(given, land), land))
        tree = trial.content()
    chain: Chain = {name: Link(kind, tree["stages"].get(name) or {}) for name, kind in land.stages.items()}
    for name, link in list(chain.items()):
        chain = link.kind.lengthened(name, chain)
    return chain


def behind(chain: Chain, name: str, more: Chain) -> Chain:
    """The chain with further stages right behind one of it.

    Raises:
        UserError: one of them is called as a stage that there is.
    """
    for each in more:
        if each in chain:
            raise UserError(
                f"the pipeline has a stage '{each}' already, which {name} would add",
                field=f"stages.{each}",
                code="two_stages",
                hint="give it another name",
            )
    found: dict[str, Link] = {}
    for each, link in chain.items():
        found[each] = link
        if each == name:
            found |= more
    return found


def _asks(item: Override, land: Landscape) -> bool:
    """Whether an override may change which stages there are."""
    if is_group(item):
        return False
    own, name, *rest = [*item.key_or_group.split("."), "", ""][:3]
    asking = getattr(land.stages.get(name), "lengthening", ())
    return own == "stages" and any(not part or part in asking for part in rest) and bool(asking)


def _applicable(given: Sequence[Override], land: Landscape) -> Iterator[Override]:
    """The overrides of values of stages that the recipe has; of a sweep its first value."""
    for item in given:
        own, _, rest = item.key_or_group.partition(".")
        if is_group(item) or (own == "stages" and rest.partition(".")[0] not in land.stages):
            continue
        if not item.is_sweep_override():
            yield item
        elif item.is_discrete_sweep():
            yield from parse([first_choice(item)])
