"""What a plan says of memory: closed forms against real tensors, traces against the same passes with numbers."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch

from align.checkpoints.compatibility import ParentMode
from align.cli.dispatch import main
from align.config.registries import adapters
from align.config.schema import Load
from align.models.fingerprint import read_model_config
from align.models.shared_base import storages
from align.planning.devices import GIB, device_of
from align.planning.memory.bases import META, RehearsedBases
from align.planning.memory.parts import rollout_bytes, state_bytes, weight_bytes
from align.planning.memory.trace import Live, traced
from align.roles import Role
from align.training.objectives import LanguageModeling
from align.training.optimizer import make_optimizer
from align.training.options import Optimizer, TrainingOptions
from tests.tiny import save_tiny_llama
from tests.tiny_chain import (
    HOME,
    PRECISIONS,
    base,
    bases,
    covered,
    finished,
    fresh,
    grid_beyond,
    methods_and_loads,
    pipeline_words,
)
from tests.tiny_training import token_rows

HERE = {"device": "cpu", "memory_bytes": 8 * GIB, "processor": "one"}


@cache
def deep() -> Any:
    """A model with more layers than a trace computes."""
    return save_tiny_llama(HOME / "deep", layers=5)


def rehearsed(method: str, load: Load, folder: Any = None, **options: Any) -> Role:
    """A fresh role on the meta device."""
    folder, adapter = folder or base(), adapters.get(method)(**options)
    found = RehearsedBases(folder, read_model_config(folder), "cpu", False)
    with META:
        return found.fresh(None, adapter, ParentMode(None, load), "policy")


def own(role: Role, below: Any) -> list[torch.Tensor]:
    """The tensors of a role that are not the base's."""
    shared = {id(tensor) for tensor in (*below.model.parameters(), *below.model.buffers())}
    every = {id(tensor): tensor for tensor in (*role.parameters(), *role.buffers())}
    return [tensor for key, tensor in every.items() if key not in shared]


@pytest.mark.parametrize(("method", "load"), covered(methods_and_loads(), 1))
def test_rehearsed_tensors_are_the_bytes_of_real_ones(method, load):
    real_bases = bases()
    real = fresh(method, load, real_bases)
    planned_bases = RehearsedBases(base(), read_model_config(base()), "cpu", False)
    with META:
        planned = planned_bases.fresh(None, adapters.get(method)(), ParentMode(None, load), "policy")
    expected = own(real, real_bases.root(load))
    found = own(planned, planned_bases.root(load))
    assert sum(tensor.nbytes for tensor in found) == sum(tensor.nbytes for tensor in expected)
    learned = [tensor for tensor in found if tensor.requires_grad]
    assert (
        sum(tensor.numel() for tensor in learned) == adapters.get(method)().count(read_model_config(base())).trainable
    )


@pytest.mark.parametrize("load", PRECISIONS)
def test_weights_of_a_base_at_every_precision(load):
    real = bases().root(load)
    planned = RehearsedBases(base(), read_model_config(base()), "cpu", False).root(load)
    assert weight_bytes(planned.model, load) == sum(storages([real.model]).values())


@pytest.mark.parametrize("optimizer", [Optimizer.adamw, Optimizer.sgd])
def test_states_of_an_optimiser(optimizer):
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((3, 5), (70, 80), (7,))]
    made = make_optimizer([{"params": parameters, "lr": 1e-3}], TrainingOptions(optimizer=optimizer))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    made.step()
    held = [each for state in made.state.values() for each in state.values() if isinstance(each, torch.Tensor)]
    assert sum(state_bytes(p.numel(), optimizer) for p in parameters) == sum(each.nbytes for each in held)


@pytest.mark.parametrize("method", ["lora", "full", "prefix", "feature_extraction"])
def test_a_trace_of_some_layers_is_the_pass_through_all_of_them(method):
    real = LanguageModeling(fresh(method, Load.fp32, bases(deep())))
    rows = token_rows()
    batch = real.collate(rows)
    vocabulary = real.role.tree.config.vocab_size
    with Live(vocabulary, [*real.parameters(), *real.buffers()]) as live:
        real.train()
        loss = real(batch)[0]
        forward, live.peak = live.peak, live.bytes
        loss.backward()
    found = traced(LanguageModeling(rehearsed(method, Load.fp32, deep())), rows, vocabulary)
    assert found.forward == pytest.approx(forward, rel=0.01)
    assert found.peak == pytest.approx(max(forward, live.peak), rel=0.01)


def test_checkpointing_keeps_less_and_no_gradients_keep_least():
    role = rehearsed("lora", Load.fp32, deep())
    objective = LanguageModeling(role)
    rows, vocabulary = token_rows(), role.tree.config.vocab_size
    plain, unlearned = traced(objective, rows, vocabulary), traced(objective, rows, vocabulary, learns=False)
    role.tree.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    less = traced(objective, rows, vocabulary)
    assert unlearned.peak < less.peak < plain.peak


def test_the_cache_of_a_rollout():
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"num_hidden_layers": 3, "vocab_size": 100, "intermediate_size": 8}
    found = rollout_bytes(config, 4, [10, 30], 40)
    columns, width = 128, 16  # 70 columns in blocks of 64
    assert found["cache"] == (3 + 1) * 2 * 2 * columns * 2 * width * 4
    assert found["logits"] == 2 * 100 * 20


@pytest.mark.parametrize(
    "words",
    grid_beyond(
        ["rlhf", "kto", "dpo", "orpo", "pretrain", "lr_range", "rlhf stages.ppo.ptx_coef=0.1"], {"rlhf", "kto"}
    ),
)
def test_every_stage_can_be_planned(words, capfd):
    code, answer = planned(capfd, *pipeline_words(*words.split(), "device=cpu"))
    assert code == 0 and answer["fits"] is True
    for stage in answer["stages"].values():
        assert stage["low"] < stage["peak_bytes"] == sum(stage["parts"].values()) < stage["high"]
        assert stage["peak_bytes"] == max(stage["phases"].values())
        assert stage["parts"]["process"] < stage["peak_bytes"] and stage["changes"] == []


def test_what_does_not_fit_is_told_what_to_change(capfd):
    words = pipeline_words("sft", "device=0.5GB", "stages.sft.batch_size=32")
    code, answer = planned(capfd, *words)
    sft = answer["stages"]["sft"]
    assert code == 0 and answer["fits"] is False and sft["minutes"] is None
    smaller = {change["set"]: change["peak_bytes"] for change in sft["changes"]}
    assert "stages.sft.gradient_checkpointing=true" in smaller and "model.load=nf4" in smaller
    assert smaller["stages.sft.micro_tokens=96"] < sft["peak_bytes"]


def test_minutes_come_from_an_earlier_run(capfd):
    folder = finished()
    words = [*pipeline_words("rlhf"), f"out={folder.parent}", "device=cpu"]
    _, answer = planned(capfd, *words)
    longer = planned(capfd, *words, "stages.sft.max_steps=20")[1]["stages"]["sft"]["minutes"]
    sft = answer["stages"]["sft"]["minutes"]
    assert sft["runs"] >= 1 and 0 < sft["low"] <= sft["high"]
    assert longer["high"] == pytest.approx(10 * sft["high"], rel=0.5)
    assert answer["stages"]["ppo"]["minutes"] is not None


@pytest.mark.parametrize(
    ("name", "kind", "size"),
    [("h200", "cuda", 139 * GIB), ("24GB", "cuda", 24 * 10**9), ("24GiB", "cuda", 24 * GIB), ("cpu", "cpu", 8 * GIB)],
)
def test_devices_by_name_and_by_size(name, kind, size):
    found = device_of(name, HERE)
    assert (found.kind, found.bytes) == (kind, size)


def test_an_unknown_device_is_answered_with_the_nearest(capfd):
    assert main(["plan", "pipeline=sft", "device=h20"]) == 2
    assert "did you mean 'h200'?" in capfd.readouterr().err


def planned(capfd: Any, *words: str) -> tuple[int, dict[str, Any]]:
    """(exit code, answer) of `align plan --json`."""
    capfd.readouterr()
    code = main(["plan", *words, "--json"])
    out, err = capfd.readouterr()
    answer = json.loads(out)
    assert "stages" in answer, err
    return code, answer
