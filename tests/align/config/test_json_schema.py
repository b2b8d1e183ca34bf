"""The JSON schema of recipes takes every recipe of the package, and refuses what composing refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from align.config.json_schema import recipe_schema

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
TOP = sorted([*RECIPES.glob("experiment/*.yaml"), *RECIPES.glob("pipeline/*.yaml")])
CHECK = jsonschema.Draft202012Validator(recipe_schema())


def problems(recipe: Any) -> list[str]:
    return [error.message for error in CHECK.iter_errors(recipe)]


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(recipe_schema())


@pytest.mark.parametrize("path", TOP, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_of_the_package_fits(path: Path) -> None:
    assert problems(yaml.safe_load(path.read_text("utf-8"))) == []


GOOD = {
    "defaults": [{"override /pipeline": "rlhf"}],
    "model": {"load": "nf4"},
    "adapter": {"method": "vera", "rank": 8},
    "stages": {"sft": {"lr": "${model.lr_scale}"}, "ppo": {"kl_coef": 0.1, "adapter": {"rank": 4}}, "mine": None},
    "seed": 3,
}


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("seed",), "three"),
        (("sead",), 3),
        (("model", "load"), "nf5"),
        (("adapter",), {"method": "verra"}),
        (("adapter", "rnak"), 8),
        (("stages", "sft", "learning_rate"), 1e-3),
        (("stages", "ppo", "advantage"), "gea"),
        (("stages", "ppo", "data"), {"conversation": {}}),
    ],
)
def test_a_mistake_is_seen(where: tuple[str, ...], value: Any) -> None:
    assert problems(GOOD) == []
    recipe = copy.deepcopy(GOOD)
    node: Any = recipe
    for step in where[:-1]:
        node = node[step]
    node[where[-1]] = value
    assert problems(recipe)
