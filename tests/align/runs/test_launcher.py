"""Settings of accelerate that contradict the recipe are refused by one line that names our option."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.config.compose import compose
from align.runs.launcher import check_launcher
from data_prep.core.errors import UserError
from tests.tiny_chain import execute, sft

PLAIN = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_DYNAMO_BACKEND": "no",
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "false",
}
"""What `accelerate launch` sets where nothing is asked of it."""


@pytest.mark.parametrize(
    ("variable", "value", "option"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "stages.sft.autocast=bf16"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "mixed_precision to no"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "mixed_precision to no"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "stages.NAME.batch_size"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend to no"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "distributed.shard=base"),
        ("ACCELERATE_USE_FSDP", "true", "distributed.shard=base"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "distributed.shard=base"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "distributed.shard=base"),
    ],
)
def test_a_setting_that_contradicts_the_recipe_is_refused(
    variable: str, value: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, plain in {**PLAIN, variable: value}.items():
        monkeypatch.setenv(name, plain)
    with pytest.raises(UserError) as caught:
        execute(compose(sft(tmp_path)))
    assert str(caught.value).startswith(f"{variable}: accelerate asks for ") and option in str(caught.value)
    assert not (tmp_path / "n").exists()


def test_what_agrees_with_the_recipe_is_taken(tmp_path: Path) -> None:
    check_launcher(compose(sft(tmp_path)).stages, PLAIN)
    agreed = compose(sft(tmp_path, "stages.sft.autocast=bf16"))
    check_launcher(agreed.stages, {**PLAIN, "ACCELERATE_MIXED_PRECISION": "bf16"})
