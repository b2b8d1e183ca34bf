"""4-bit precisions: what they ask of bitsandbytes, and that a change along a chain is a change of precision."""

from __future__ import annotations

import itertools

import pytest
import torch

from align.adapters.qlora import Compute, FourBit
from align.checkpoints.compatibility import Planned, choose_parent_mode, options_of
from align.config.registries import adapters
from align.config.schema import Load, OnParent, OnPrecisionChange, spelled
from align.roles import Role
from data_prep.core.errors import UserError
from tests.tiny_chain import bases, fresh, logits

CASES = {
    "nf4": {},
    "fp4": {"four_bit": FourBit.fp4},
    "nf4_single": {"double_quantization": False},
    "fp4_single_bf16": {"four_bit": FourBit.fp4, "double_quantization": False, "compute": Compute.bf16},
    "nf4_fp32": {"compute": Compute.fp32},
}


@pytest.mark.parametrize("name", CASES)
def test_options_name_a_precision_and_the_base_has_it(name, tmp_path):
    import bitsandbytes as bnb

    adapter = adapters.get("qlora")(**CASES[name])
    load = choose_parent_mode(None, adapter, OnParent.auto, None, OnPrecisionChange.refuse).load
    assert load.value == name == adapter.quantization() and load.four_bit
    found = bases()
    role = fresh("qlora", load, found, **CASES[name])
    layers = [m for m in found.root(load).model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert layers and {m.weight.quant_state.quant_type for m in layers} == {name[:3]}
    assert {m.weight.quant_state.nested for m in layers} == {"single" not in name}
    expected = torch.bfloat16 if "bf16" in name else torch.float32
    assert {m.compute_dtype for m in layers} == {expected}
    role.adapter.save(role.carrier, tmp_path)
    again = Role("again", role.adapter.load(found.root(load).tree(), tmp_path, trainable=False), role.adapter)
    assert torch.equal(logits(again), logits(role))


def test_every_precision_is_named_and_spelled_from_its_parts():
    parts = {(load.weights, load.double_quant, load.compute) for load in Load}
    four_bit = itertools.product(("nf4", "fp4"), (True, False), (None, "fp32", "bf16"))
    assert parts == {("fp32", True, None), ("bf16", True, None), *four_bit} and len(Load) == 14
    for load in Load:
        assert load.name == load.value == spelled(load.weights, load.double_quant, load.compute)
        assert load.four_bit == (load.weights not in ("fp32", "bf16"))
    assert [Load.nf4.computes_in(device) for device in ("cuda", "cpu")] == ["bf16", "fp32"]
    assert [load.computes_in("cuda") for load in (Load.fp32, Load.bf16, Load.fp4_fp32)] == ["fp32", "bf16", "fp32"]
    assert Load.nf4_single_bf16.computes_in("cpu") == "bf16"


def test_each_precision_is_another_function():
    found = bases()
    each = {load: logits(Role("bare", found.root(load).tree(), None)) for load in (Load.nf4, Load.fp4, Load.nf4_single)}
    assert not torch.equal(each[Load.nf4], each[Load.fp4]) and not torch.equal(each[Load.nf4], each[Load.nf4_single])


@pytest.mark.parametrize("name", [name for name in CASES if name != "nf4"])
def test_another_quantisation_along_a_chain_is_a_change_of_precision(name):
    below = adapters.get("qlora")()
    parent = Planned("sft", "policy", "qlora", options_of(below), "nf4")
    adapter = adapters.get("qlora")(**CASES[name])
    with pytest.raises(UserError, match=f"trained on a nf4 base, this stage would load it as {name}"):
        choose_parent_mode(parent, adapter, OnParent.auto, None, OnPrecisionChange.refuse)
    allowed = choose_parent_mode(parent, adapter, OnParent.auto, None, OnPrecisionChange.recalibrate)
    assert allowed.forced == (f"precision nf4 -> {name}",)
