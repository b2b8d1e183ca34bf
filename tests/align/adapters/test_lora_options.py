"""Options of the LoRA family: each must start as its parent, be counted, kept, merged and loaded by stock peft."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from align.adapters.delta_lora import Form
from align.adapters.lora import Init
from align.checkpoints.compatibility import ParentMode
from align.config.registries import adapters
from align.config.schema import Load
from align.models.low_rank import stack
from align.models.shared_base import _four_bit
from align.roles import Role
from align.training.objectives import LanguageModeling
from data_prep.core.errors import UserError
from data_prep.types import Tokens
from tests.tiny_chain import CPU, base, bases, fresh, logits, read, sentences, shared_bytes, stirred

VARIANTS = {
    "dora": ("lora", {"dora": True}),
    "pissa": ("lora", {"init": Init.pissa, "rank": 4}),
    "pissa-rslora": ("lora", {"init": Init.pissa, "rslora": True, "rank": 4, "rank_pattern": {"mlp.up_proj": 7}}),
    "rslora": ("lora", {"rslora": True}),
    "top": ("lora", {"layers": "top_1"}),
    "blocks": ("vera", {"layers": [0]}),
    "patterns": ("lora", {"target_modules": ["*.mlp.*", "q_proj"], "rank_pattern": {"q_proj": 3}, "rank": 5}),
    "alphas": ("lora", {"alpha_pattern": {"*.layers.1.*": 3.0}, "rank_pattern": {"*.layers.0.mlp.*": 2}}),
    "projected": ("lora_fa", {"projection": True}),
    "plus-dora": ("lora_plus", {"dora": True}),
    "tokens": ("lora", {"trainable_tokens": ["<|user|>", "<|end|>"], "rslora": True}),
    "tokens-dora": ("lora_plus", {"trainable_tokens": ["<|end|>"], "dora": True}),
    "tokens-fa": ("lora_fa", {"trainable_tokens": ["<|end|>"]}),
    "delta-paused": ("delta_lora", {"start_step": 2}),
    "delta-patterns": ("delta_lora", {"start_step": 2, "rank_pattern": {"q_proj": 3}}),
}
LOADS = (Load.fp32, Load.nf4)
EACH = pytest.mark.parametrize("name", VARIANTS)
EACH_LOAD = pytest.mark.parametrize("load", LOADS, ids=lambda load: load.value)


def plain(name: str, load: Load, found=None) -> Role:
    method, options = VARIANTS[name]
    torch.manual_seed(3)
    return (found or bases()).fresh(None, adapters.get(method)(**options), ParentMode(None, load), "policy")


@EACH_LOAD
@EACH
def test_it_starts_as_its_parent_and_leaves_the_base_alone(name, load):
    found = bases()
    before = shared_bytes(found.root(load))
    role = plain(name, load, found)
    bare = Role("bare", found.root(load).tree(), None)
    torch.testing.assert_close(logits(role), logits(bare), rtol=0, atol=1e-5)
    trained = [p for p in role.parameters() if p.requires_grad]
    counts = role.adapter.count(read(base() / "config.json"))
    assert counts.trainable == sum(p.numel() for p in trained)
    stirred(role)
    assert not torch.allclose(logits(role), logits(bare), atol=1e-3)
    assert shared_bytes(found.root(load)) == before


@EACH_LOAD
@EACH
def test_it_is_kept_exactly_and_stock_peft_computes_the_same(name, load, tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    found = bases()
    role = stirred(plain(name, load, found))
    role.adapter.save(role.carrier, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    counts = role.adapter.count(read(base() / "config.json"))
    assert sum(t.numel() for t in tensors.values()) == (counts.trainable if counts.saved is None else counts.saved)
    for trainable in (False, True):
        torch.manual_seed(99)
        again = Role("again", role.adapter.load(found.root(load).tree(), tmp_path, trainable), role.adapter)
        assert torch.equal(logits(again), logits(role))
        assert any(p.requires_grad for p in again.parameters()) == trainable
    options = {"quantization_config": _four_bit(CPU), "device_map": {"": CPU}} if load is Load.nf4 else {}
    stock = AutoModelForCausalLM.from_pretrained(base(), dtype=torch.float32, **options)
    loaded = PeftModel.from_pretrained(stock, str(tmp_path)).train()
    with torch.no_grad():
        theirs = torch.cat([loaded(input_ids=torch.tensor([ids])).logits[0] for ids in sentences()])
    torch.testing.assert_close(theirs, logits(role), rtol=0, atol=2e-5)


@EACH_LOAD
@EACH
def test_it_merges_and_stacks_as_its_traits_say(name, load, tmp_path):
    found = bases()
    role = stirred(plain(name, load, found))
    role.adapter.save(role.carrier, tmp_path)
    merged = role.adapter.merge(role.adapter.load(found.root(load).private(), tmp_path, trainable=False))
    assert not any("lora" in n or "term_" in n for n, _ in [*merged.named_parameters(), *merged.named_buffers()])
    torch.testing.assert_close(logits(Role("merged", merged, None)), logits(role), rtol=0, atol=1e-5)
    if role.adapter.traits.low_rank:
        tree = found.root(load).tree()
        stack(tree, role.adapter.low_rank_terms(role.carrier))
        torch.testing.assert_close(logits(Role("stacked", tree, None)), logits(role), rtol=0, atol=1e-5)


def test_pissa_starts_at_the_first_singular_directions():
    role = plain("pissa", Load.fp32)
    found = bases().root(Load.fp32).model
    for name, term in role.adapter.low_rank_terms(role.carrier).items():
        weight = found.get_submodule(name).weight
        left, size, right = torch.linalg.svd(weight)
        half = term.down_RI.shape[0] // 2
        start = term.scale * term.up_OR[:, :half] @ term.down_RI[:half]
        torch.testing.assert_close(start, left[:, :half] * size[:half] @ right[:half], rtol=0, atol=1e-5)


def saved_bytes(role: Role) -> int:
    """Bytes of activations that one forward keeps for backward; parameters and buffers of the role do not count."""
    own = {t.untyped_storage().data_ptr() for t in [*role.parameters(), *role.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    objective = LanguageModeling(role)
    batch = objective.collate([Tokens(ids, [True] * len(ids), str(i)) for i, ids in enumerate(sentences(8))])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        objective(batch)[0]
    return sum(kept.values())


def test_lora_fa_keeps_fewer_activations_than_lora():
    """By the inputs of the targeted layers, which LoRA keeps for the gradient of A."""
    tokens = sum(len(ids) for ids in sentences(8))
    more, less = saved_bytes(fresh("lora", Load.fp32)), saved_bytes(fresh("lora_fa", Load.fp32))
    inputs = (32 + 32 + 32 + 64) * 2  # distinct inputs of q/k/v, o, gate/up and down in each of two blocks
    assert more - less >= 0.9 * tokens * inputs * 4, (more, less)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_a_projected_step_is_the_one_full_tuning_would_take_inside_the_row_space(autocast):
    """In float32 whatever the autocast: bfloat16 would be three parts in a thousand off."""
    from align.adapters.layers.lora_offset import lora_layers

    torch.manual_seed(0)
    roles = [
        bases().fresh(None, adapters.get("lora_fa")(projection=p), ParentMode(None, Load.fp32), "p") for p in (0, 1)
    ]
    roles[1].load_state_dict(roles[0].state_dict())
    found = []
    for role in roles:
        objective = LanguageModeling(role)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            objective(objective.collate([Tokens(ids, [True] * len(ids), "r") for ids in sentences()]))[0].backward()
        found.append({n: m for n, m in lora_layers(role.carrier).items()})
    for name, layer in found[0].items():
        down = layer.lora_A["default"].weight.double()
        gradient = layer.lora_B["default"].weight.grad.double() / layer.scaling["default"] ** 2
        expected = gradient @ torch.linalg.inv(down @ down.T)
        ours = found[1][name].lora_B["default"].weight.grad.double()
        assert float((ours - expected).norm() / expected.norm()) < 1e-4


def test_a_continued_projection_uses_the_loaded_a(tmp_path):
    from align.adapters.layers.lora_offset import lora_layers

    role = stirred(plain("projected", Load.fp32))
    role.adapter.save(role.carrier, tmp_path)
    torch.manual_seed(77)
    again = Role("again", role.adapter.load(bases().root(Load.fp32).tree(), tmp_path, True), role.adapter)
    rows = [Tokens(ids, [True] * len(ids), "r") for ids in sentences()]
    for each in (role, again):
        objective = LanguageModeling(each)
        objective(objective.collate(rows))[0].backward()
    for name, layer in lora_layers(role.carrier).items():
        other = lora_layers(again.carrier)[name]
        assert torch.equal(layer.lora_B["default"].weight.grad, other.lora_B["default"].weight.grad)


def test_lora_plus_tells_tensors_apart_by_name():
    role = fresh("lora_plus", Load.fp32, lr_ratio=8.0, dora=True)
    first, second = role.adapter.parameter_groups(role.carrier, 1e-3)
    names = {id(p): n for n, p in role.named_parameters()}
    assert (first["lr"], second["lr"]) == (1e-3, 8e-3)
    assert all(".lora_B." in names[id(p)] for p in second["params"])
    assert {n.split(".")[-3] for n in (names[id(p)] for p in first["params"])} == {"lora_A", "lora_magnitude_vector"}


@pytest.mark.parametrize(
    ("method", "options", "field", "problem"),
    [
        ("lora", {"rank": 33}, "adapter.rank", r"at most the width 32 of model.layers.0.self_attn.q_proj \(got 33\)"),
        ("lora", {"rank_pattern": {"q_proj": 0}}, "adapter.rank", "at least 1"),
        ("lora", {"rank_pattern": {"z_proj": 2}}, "adapter.rank_pattern", "matches no targeted layer"),
        ("lora", {"target_modules": ["z_proj"]}, "adapter.target_modules", "could match: down_proj, gate_proj, k_proj"),
        ("vera", {"target_modules": "*.z.*"}, "adapter.target_modules", "could match: down_proj, gate_proj"),
        ("lora", {"target_modules": []}, "adapter.target_modules", "is empty"),
        ("lora", {"layers": "top_3"}, "adapter.layers", "top_1 to top_2"),
        ("lora", {"layers": [2]}, "adapter.layers", "numbers from 0 to 1"),
        ("lora", {"dora": True, "init": Init.pissa}, "adapter.dora", "init=default alone"),
        ("lora_fa", {"dora": True}, "adapter.dora", "freezes A"),
        ("lora", {"trainable_tokens": ["a"], "init": Init.pissa}, "adapter.trainable_tokens", "init=default alone"),
        ("adalora", {"trainable_tokens": ["a"]}, "adapter.trainable_tokens", "does not go with adalora"),
        ("delta_lora", {"trainable_tokens": ["a"]}, "adapter.trainable_tokens", "does not go with delta_lora"),
        ("delta_lora", {"dropout": 0.1, "form": Form.literal}, "adapter.dropout", "does not go with"),
    ],
)
def test_bad_options_are_found_from_the_config_alone(method, options, field, problem):
    adapter = adapters.get(method)(**options)
    found = adapter.check(read(base() / "config.json"))
    assert len(found) == 1 and found[0].field == field
    with pytest.raises(UserError, match=problem):
        raise found[0]
    with pytest.raises(UserError, match=problem):
        fresh(method, Load.fp32, **options)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8.0 / 4), (True, 8.0 / 2)])
def test_the_term_is_scaled_as_the_papers_say(rslora, scale):
    role = fresh("lora", Load.fp32, rank=4, alpha=8.0, rslora=rslora)
    assert {term.scale for term in role.adapter.low_rank_terms(role.carrier).values()} == {scale}


def test_veras_projections_come_from_their_seed_alone(tmp_path):
    """Another global seed, other threads and an empty file of them: the same function."""
    role = fresh("vera", Load.fp32, seed=1)
    role.adapter.save(role.carrier, tmp_path)
    assert not [
        name for name in load_file(tmp_path / "adapter_model.safetensors") if "vera_A" in name or "vera_B" in name
    ]
    torch.manual_seed(4321)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 2)
    try:
        again = role.adapter.load(bases().root(Load.fp32).tree(), tmp_path, trainable=False)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(logits(Role("again", again, role.adapter)), logits(role))
    other = fresh("vera", Load.fp32, seed=1, projection_seed=1)
    assert not torch.equal(other.carrier.base_model.vera_A["default"], role.carrier.base_model.vera_A["default"])


def test_a_base_has_one_pair_of_vera_projections():
    found = bases()
    fresh("vera", Load.fp32, found)
    fresh("vera", Load.fp32, found, rank=64)
    with pytest.raises(UserError, match=r"one pair of VeRA projections \(got seeds 0 and 1\)"):
        fresh("vera", Load.fp32, found, projection_seed=1)
