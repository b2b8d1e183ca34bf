"""The model presets compose, and each one's architecture is one that the tests run."""

from __future__ import annotations

import pytest

from align.config.compose import compose
from align.config.hydra_loader import group_choices, recipes
from tests.architectures import CHAINED, PRESETS

NO_PRESETS = {"hf", "nano", "nano_blank"}


def test_every_preset_says_its_architecture_and_that_is_run():
    with recipes(None):
        assert set(PRESETS) == set(group_choices("model")) - NO_PRESETS
    assert set(PRESETS.values()) <= set(CHAINED)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_composes(name):
    model = compose([f"model={name}", "data=smalltalk"]).model
    assert model.name == name and model.path.count("/") == 1 and not model.trust_remote_code
    assert model.template == ("plain" if PRESETS[name] in ("gpt_neox", "opt") else None)
    qlora = compose([f"model={name}", "adapter=qlora", "data=smalltalk"])
    assert all(spec.adapter.quantization() == "nf4" for spec in qlora.stages if spec.stage.makes)
