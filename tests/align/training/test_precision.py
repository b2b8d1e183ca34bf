"""What `autocast=auto` is on which device, and what checks of equality then allow."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from align.checkpoints.compatibility import ParentMode
from align.config.schema import Load
from align.rl import invariants
from align.stages.ppo import PPO
from align.stages.sft import SFT
from align.training.optimizer import autocast, is_narrow
from align.training.options import Autocast
from tests.tiny_chain import compose, execute, sft

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("wanted", "device", "able", "narrow"),
    [
        ("auto", CPU, True, False),
        ("auto", CUDA, True, True),
        ("auto", CUDA, False, False),
        ("auto", torch.device("mps"), True, False),
        ("bf16", CPU, False, True),
        ("bf16", CUDA, True, True),
        ("off", CUDA, True, False),
    ],
)
def test_products_are_narrow_where_asked_for_and_on_cards_that_can(wanted, device, able, narrow, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: able)
    options = SFT(autocast=Autocast[wanted])
    assert is_narrow(options, device) is narrow
    if device == CPU:
        with autocast(options, device):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is (torch.bfloat16 if narrow else torch.float32)
    assert SFT().autocast is Autocast.auto


def test_a_stage_that_was_done_in_float32_stays_done(tmp_path):
    """`auto` on a CPU is what `off` was: runs of earlier versions are not trained again."""
    words = sft(tmp_path, "stages.sft.max_steps=1")
    execute(compose([*words, "stages.sft.autocast=off"]))
    entry = execute(compose([*words, "stages.sft.autocast=auto"]))["stages"][0]
    assert entry["skipped"] and entry["peak_gpu_bytes"] is None
    assert not execute(compose([*words, "deterministic=true"]))["stages"][0]["skipped"]


@pytest.mark.parametrize(
    ("device", "load", "wanted", "deviation", "mean", "passes", "limit"),
    [
        (CPU, Load.fp32, "auto", 2e-5, 1e-6, False, 1e-5),
        (CPU, Load.fp32, "auto", 9e-6, 1e-6, True, 1e-5),
        (CUDA, Load.fp32, "off", 9e-4, 1e-6, True, 1e-3),
        (CUDA, Load.fp32, "off", 2e-3, 1e-6, False, 1e-3),
        (CUDA, Load.fp32, "auto", 2e-2, 1e-3, True, None),
        (CUDA, Load.bf16, "off", 2e-2, 5e-3, False, None),
        (CPU, Load.fp32, "bf16", 2e-2, 1e-3, True, None),
    ],
)
def test_first_ratios_may_differ_by_what_device_and_type_round(
    device, load, wanted, deviation, mean, passes, limit, monkeypatch
):
    from data_prep.core.errors import TrainingStopped

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    context = SimpleNamespace(
        accelerator=SimpleNamespace(device=device),
        parent_mode=ParentMode(None, load),
        spec=SimpleNamespace(stage=PPO(autocast=Autocast[wanted])),
    )
    step0: dict[str, object] = {}
    numbers = {"max_ratio_dev": deviation, "ratio_dev_mean": mean}
    if passes:
        invariants.record_first_minibatch(numbers, context, step0)
    else:
        with pytest.raises(TrainingStopped, match="away from 1"):
            invariants.record_first_minibatch(numbers, context, step0)
    assert step0["ratio_at_most"] == limit
