"""Bottleneck adapters, IA3 and feature extraction: what they compute, where they stand, on several architectures."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from align.adapters.bottleneck import Activation, Placement
from align.config.registries import adapters
from align.config.schema import Load
from align.models.packing import pack
from align.models.shared_base import BaseIdentity, SharedBase
from align.roles import Role
from data_prep.core.errors import UserError
from tests.tiny_chain import CPU, HOME, stirred

SMALL = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
MODELS = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64},
    "qwen2": {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64},
    "gpt2": {"n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "gpt_neox": {"intermediate_size": 48, "max_position_embeddings": 64},
}
SENTENCES = [[(7 * i + 3 * n) % 118 + 1 for i in range(n)] for n in (5, 11, 3)]
CASES = [
    ("ia3", {}),
    ("bottleneck", {"bottleneck_size": 8}),
    ("bottleneck", {"bottleneck_size": 8, "placement": Placement.houlsby, "norms": True}),
    ("bottleneck", {"bottleneck_size": 8, "placement": Placement.parallel, "own_norm": True, "layers": "top_2"}),
    ("feature_extraction", {"last_blocks": 2, "norms": True, "head": True}),
    ("feature_extraction", {"last_blocks": 3}),
]


@cache
@torch.random.fork_rng(devices=[])  # a test that seeds draws the same, whether this was made before or now
def opened(kind: str) -> SharedBase:
    config = AutoConfig.for_model(kind, **SMALL, **MODELS[kind])
    torch.manual_seed(0)
    path = HOME / f"blocks-{kind}"
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return SharedBase.open(path, BaseIdentity(kind, None, kind), Load.fp32, CPU)


@torch.no_grad()
def each(role: Role) -> torch.Tensor:
    return role.logits(role.hidden(pack(SENTENCES)))


def made(kind: str, method: str, **options) -> Role:
    torch.manual_seed(1)
    adapter = adapters.get(method)(**options)
    return Role("policy", adapter.attach(opened(kind).tree(), trainable=True), adapter)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("method", "options"), CASES, ids=[f"{m}-{i}" for i, (m, _) in enumerate(CASES)])
def test_on_every_architecture(method, options, kind, tmp_path):
    """It starts as the base, is counted, is kept exactly, and the base stays as it was."""
    if kind == "opt" and options.get("placement") is Placement.parallel:
        with pytest.raises(UserError, match="knows no feed-forward module of opt"):
            made(kind, method, **options)
        return
    bare = each(Role("bare", opened(kind).tree(), None))
    role = made(kind, method, **options)
    assert torch.equal(each(role), bare)
    counts = role.adapter.count(opened(kind).model.config.to_dict())
    trained = [p for p in role.parameters() if p.requires_grad]
    assert counts.trainable == sum(p.numel() for p in trained)
    stirred(role)
    assert not torch.allclose(each(role), bare, atol=1e-3)
    role.adapter.save(role.carrier, tmp_path)
    again = Role("again", role.adapter.load(opened(kind).tree(), tmp_path, trainable=False), role.adapter)
    assert torch.equal(each(again), each(role))
    assert torch.equal(each(Role("bare", opened(kind).tree(), None)), bare)
    if role.adapter.traits.mergeable:
        merged = role.adapter.merge(role.adapter.load(opened(kind).private(), tmp_path, trainable=False))
        torch.testing.assert_close(each(Role("merged", merged, None)), each(role), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_ia3_in_stock_peft(kind, tmp_path):
    from peft import PeftModel

    role = stirred(made(kind, "ia3"))
    role.adapter.save(role.carrier, tmp_path)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(HOME / f"blocks-{kind}"), str(tmp_path))
    with torch.no_grad():
        theirs = torch.cat([stock.eval()(input_ids=torch.tensor([ids])).logits[0] for ids in SENTENCES])
    torch.testing.assert_close(each(role), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "scaled"),
    [
        ("llama", {"k_proj": False, "v_proj": False, "down_proj": True}),
        ("qwen2", {"k_proj": False, "v_proj": False, "down_proj": True}),
        ("opt", {"k_proj": False, "v_proj": False, "fc2": True}),
        ("gpt2", {"c_attn": False, "c_proj": True}),
    ],
)
def test_ia3_scales_what_the_paper_scales(kind, scaled):
    """Keys and values at their outputs, the feed-forward's inner activations at the input of its last layer."""
    found = adapters.get("ia3")().shapes(opened(kind).model.config.to_dict())
    assert {name.rpartition(".")[2]: at_input for name, (_, at_input) in found.items()} == scaled
    assert all("mlp" in name for name in found if kind == "gpt2" and name.endswith("c_proj"))


@pytest.mark.parametrize("activation", list(Activation))
def test_a_serial_bottleneck_by_hand(activation):
    """h + s U phi(D h) at the output of the feed-forward, computed beside it from recorded outputs."""
    role = stirred(made("llama", "bottleneck", bottleneck_size=8, activation=activation, scale=2.0))
    place = role.tree.model.layers[1].mlp.down_proj
    layer, seen = place.bottleneck, []
    handle = place.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0], out)))
    each(role)
    handle.remove()
    inside, out = seen[0]
    h = F.linear(inside, place.weight)
    phi = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}[activation.value]
    expected = h + 2.0 * (phi(h @ layer.down.weight.T + layer.down.bias) @ layer.up.weight.T + layer.up.bias)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def test_a_parallel_bottleneck_by_hand():
    role = stirred(made("llama", "bottleneck", bottleneck_size=8, placement=Placement.parallel, scale=4.0))
    mlp, bare = role.tree.model.layers[0].mlp, opened("llama").tree().model.layers[0].mlp
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    layer = mlp.bottleneck
    with torch.no_grad():
        expected = bare(x) + 4.0 * layer.up(F.gelu(layer.down(x)))
        torch.testing.assert_close(mlp(x), expected, rtol=0, atol=1e-6)


def test_houlsby_stands_twice_in_a_block_and_pfeiffer_once():
    model = opened("llama").model
    places = {p: adapters.get("bottleneck")(placement=p).places(model) for p in Placement}
    assert [name.rpartition(".")[2] for name in places[Placement.houlsby]] == ["o_proj", "down_proj"] * 3
    assert [name.rpartition(".")[2] for name in places[Placement.pfeiffer]] == ["down_proj"] * 3
    assert [name.rpartition(".")[2] for name in places[Placement.parallel]] == ["mlp"] * 3


def test_a_tied_head_gets_weights_of_its_own():
    config = AutoConfig.for_model("llama", **SMALL, **MODELS["llama"], tie_word_embeddings=True)
    torch.manual_seed(0)
    path = HOME / "blocks-tied"
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    root = SharedBase.open(path, BaseIdentity("tied", None, "tied"), Load.fp32, CPU)
    adapter = adapters.get("feature_extraction")(last_blocks=0, head=True)
    tree = adapter.attach(root.tree(), trainable=True)
    assert [n for n, p in tree.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    assert tree.lm_head.weight is not tree.model.embed_tokens.weight
    assert root.model.lm_head.weight is root.model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("method", "options", "problem"),
    [
        ("feature_extraction", {"last_blocks": 4}, "the model has 3 blocks"),
        ("ia3", {"target_modules": ["zz"]}, "'zz' matches no linear layer"),
        ("ia3", {"target_modules": ["lm_head"]}, "'lm_head' is none of the layers that adapters train: embeddings and"),
        ("bottleneck", {"layers": "top_9"}, "top_1 to top_3"),
    ],
)
def test_bad_options_are_refused(method, options, problem):
    found = adapters.get(method)(**options).check(opened("llama").model.config.to_dict())
    assert len(found) == 1
    with pytest.raises(UserError, match=problem):
        raise found[0]
