"""A canary: what `align/config/hydra_loader.py` uses that is private to Hydra is still there, and means the same.

Each test uses one private name as the loader does, so that a Hydra that moves it fails here by that name rather than
somewhere in a composition.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import open_dict

from align.config import hydra_loader
from align.config.hydra_loader import Loader, combinations, loader, recipes
from tests.house.source import modules

PARAMETERS = {
    "config_loader_impl:ConfigLoaderImpl._parse_overrides_and_create_caching_repo": ["config_name", "overrides"],
    "config_loader_impl:ConfigLoaderImpl._compose_config_from_defaults_list": ["defaults", "repo"],
    "config_loader_impl:ConfigLoaderImpl._apply_overrides_to_config": ["overrides", "cfg"],
    "config_repository:ConfigRepository.load_config": ["config_path"],
    "core_plugins.basic_sweeper:BasicSweeper.split_arguments": ["overrides", "max_batch_size"],
    "defaults_list:create_defaults_list": ["repo", "config_name", "overrides_list", "prepend_hydra", "skip_missing"],
    "hydra:Hydra.__init__": ["task_name", "config_loader"],
    "utils:create_config_search_path": ["search_path_dir"],
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_what_is_private_to_hydra_is_where_it_was(name: str) -> None:
    module, _, path = name.partition(":")
    found = importlib.import_module(f"hydra._internal.{module}")
    for part in path.split("."):
        found = getattr(found, part)
    assert [each for each in inspect.signature(found).parameters if each != "self"] == PARAMETERS[name]


def test_only_the_loader_imports_what_is_private_to_hydra() -> None:
    private = re.compile(r"^\s*(from|import) hydra\._internal", re.MULTILINE)
    found = [module.name for module in modules() if private.search(module.path.read_text(encoding="utf-8"))]
    assert found == ["align.config.hydra_loader"]


def test_lists_of_values_become_jobs_in_order() -> None:
    given = OverridesParser.create().parse_overrides(["seed=0,1", "adapter=lora,vera"])
    assert combinations(given) == [
        ["seed=0", "adapter=lora"],
        ["seed=0", "adapter=vera"],
        ["seed=1", "adapter=lora"],
        ["seed=1", "adapter=vera"],
    ]


def test_a_choice_is_composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    private = Loader._parse_overrides_and_create_caching_repo

    def counted(self: Loader, config_name: str | None, overrides: list[str]) -> object:
        reads.append(config_name)
        return private(self, config_name, overrides)

    monkeypatch.setattr(Loader, "_parse_overrides_and_create_caching_repo", counted)
    hydra_loader._own_loader.cache_clear()
    with recipes(None):
        first, choices = loader().compose("config", [])
    assert "hydra" not in first and first.seed == 0
    with open_dict(first):
        first.seed, first.stages = 1, {}  # what one caller changes is not another's
    with recipes(None):
        again, _ = loader().compose("config", [])
        other, _ = loader().compose("config", ["pipeline=sft"])
    assert reads == ["config", "config"]
    assert again.seed == 0 and [*again.stages] == ["sft", "reward_model", "ppo", "evaluate"]
    assert [*other.stages] == ["sft"]
    assert choices["pipeline"] == "rlhf"


def test_the_user_s_folder_is_read_anew(tmp_path: Path) -> None:
    """A notebook's user edits a recipe and asks again."""
    recipe = tmp_path / "adapter" / "mine.yaml"
    recipe.parent.mkdir()
    for rank in (3, 5):
        recipe.write_text(f"name: lora\nrank: {rank}\n", encoding="utf-8")
        with recipes(str(tmp_path)):
            tree, _ = loader().compose("config", ["adapter=mine"])
        assert tree.adapter.rank == rank
