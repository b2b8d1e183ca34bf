"""Prefix and prompt tuning against peft's own forward, on every kind of positions, and what padding must not change."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align.adapters.soft_prompt import Init
from align.checkpoints.compatibility import Planned, choose_parent_mode, options_of
from align.config.registries import adapters
from align.config.schema import Load, OnParent, OnPrecisionChange
from align.inference.generation import RolloutEngine, Sampling
from align.models.packing import pack, pack_branches
from align.models.shared_base import BaseIdentity, SharedBase
from align.roles import Role
from data_prep.core.errors import UserError
from tests.tiny import tiny_tokenizer
from tests.tiny_chain import CPU, HOME, bases, made, read, stirred

SMALL = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64},
    "qwen2": {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64},
    "qwen3": {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 16},
    "gpt2": {"n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
}
METHODS = ("prefix", "prompt")
SENTENCES = [[(7 * i + 3 * n) % 118 + 1 for i in range(n)] for n in (5, 11, 3, 8, 2)]


@cache
@torch.random.fork_rng(devices=[])  # a test that seeds draws the same, whether this was made before or now
def folder(kind: str):
    config = AutoConfig.for_model(kind, **SMALL, **MODELS[kind])
    torch.manual_seed(0)
    path = HOME / f"soft-{kind}"
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@cache
@torch.random.fork_rng(devices=[])  # a test that seeds draws the same, whether this was made before or now
def opened(kind: str) -> SharedBase:
    return SharedBase.open(folder(kind), BaseIdentity(kind, None, kind), Load.fp32, CPU)


def role(kind: str, method: str, **options) -> Role:
    torch.manual_seed(1)
    adapter = adapters.get(method)(num_virtual_tokens=4, **options)
    return stirred(Role("policy", adapter.attach(opened(kind).tree(), trainable=True), adapter), size=0.3)


@torch.no_grad()
def each(found: Role, sequences=SENTENCES) -> torch.Tensor:
    return found.logits(found.hidden(pack(sequences)))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_packed_logits_are_those_of_stock_peft(method, kind, tmp_path):
    from peft import PeftModel

    found = role(kind, method)
    found.adapter.save(found.carrier, tmp_path)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder(kind)), str(tmp_path)).eval()
    with torch.no_grad():
        theirs = torch.cat([stock(input_ids=torch.tensor([ids])).logits[0, -len(ids) :] for ids in SENTENCES])
    torch.testing.assert_close(each(found), theirs, rtol=0, atol=1e-5)
    bare = Role("bare", opened(kind).tree(), None)
    assert not torch.allclose(each(bare), theirs, atol=1e-2), "the virtual tokens must be seen"


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_rollouts_are_teacher_forced_whatever_the_padding(method, kind):
    found = role(kind, method)
    engine = RolloutEngine(found, end_id=119)
    together = engine.generate(SENTENCES, Sampling(6, greedy=True))
    for prompt, reply in zip(SENTENCES, together, strict=True):
        alone = engine.generate([prompt], Sampling(6, greedy=True))[0]
        assert alone.ids == reply.ids
        logprobs = each(found, [[*prompt, *reply.ids]]).log_softmax(-1)[len(prompt) - 1 : -1]
        forced = logprobs.gather(1, torch.tensor(reply.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(reply.logprobs), forced, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_shared_prompts_and_many_groups_change_nothing(method):
    found = role("llama", method)
    prompts, branches = SENTENCES[:2], [[[5, 6, 7], [8]], [[9, 10], [11, 12, 13, 14]]]
    with torch.no_grad():
        shared = found.logits(found.hidden(pack_branches(prompts, branches)))
    start = 0
    for prompt, family in zip(prompts, branches, strict=True):
        start += len(prompt)
        for branch in family:
            own = each(found, [[*prompt, *branch]])[len(prompt) :]
            torch.testing.assert_close(shared[start : start + len(branch)], own, rtol=0, atol=1e-5)
            start += len(branch)


def test_a_prefix_made_by_a_network_is_saved_as_it_is_and_trained_on(tmp_path):
    found = role("llama", "prefix", init=Init.random, reparametrisation=12)
    found.adapter.save(found.carrier, tmp_path)
    assert set(found.adapter.files()) == {path.name for path in tmp_path.iterdir()}
    frozen = Role("frozen", found.adapter.load(opened("llama").tree(), tmp_path, trainable=False), found.adapter)
    again = Role("again", found.adapter.load(opened("llama").tree(), tmp_path, trainable=True), found.adapter)
    assert frozen.tree.lead.network is None and again.tree.lead.network is not None
    assert torch.equal(each(frozen), each(found)) and torch.equal(each(again), each(found))
    counts = found.adapter.count(opened("llama").model.config.to_dict())
    assert counts.trainable == sum(p.numel() for p in found.parameters() if p.requires_grad)


def test_a_prefix_of_activations_is_the_prompt_of_its_tokens():
    """Started from a text, both methods compute what the base computes behind that text."""
    torch.manual_seed(1)
    prefix = adapters.get("prefix")(num_virtual_tokens=4)
    found = Role("policy", prefix.attach(opened("gpt2").tree(), trainable=True), prefix)
    torch.manual_seed(1)
    ids = prefix.start_ids(opened("gpt2").model)
    bare = Role("bare", opened("gpt2").tree(), None)
    behind = torch.cat([each(bare, [[*ids, *row]])[4:] for row in SENTENCES])
    torch.testing.assert_close(each(found), behind, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"num_virtual_tokens": 64}, "no token would fit behind 64 virtual ones in a context of 64"),
        ({"init": Init.text}, "needs a text"),
        ({"init_text": "be kind"}, "init=text alone"),
    ],
)
def test_bad_options_are_refused(method, options, problem):
    with pytest.raises(UserError, match=problem):
        adapters.get(method)(**options).attach(opened("llama").tree(), trainable=True)


def test_ppo_from_the_base_has_the_policys_own_start_as_reference(tmp_path):
    """Virtual tokens change the function, so the bare base is not what the policy starts from."""
    run = made("sft", "adapter=lora", "name=judged", out=tmp_path)
    judge = made("reward_model", "adapter=lora", f"stages.reward_model.init={run / 'sft'}", "name=judge", out=tmp_path)
    words = ["adapter=prompt", "stages.ppo.init=base", f"stages.ppo.reward={judge / 'reward_model'}"]
    step0 = read(made("ppo", *words, "name=policy", out=tmp_path) / "run.json")["stages"][0]["metrics"]["step0"]
    assert step0["kl"] == 0.0 and step0["ratio_dev"] <= 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_parent_whose_function_would_be_lost_is_refused(method):
    parent = Planned("sft", "policy", "lora", options_of(adapters.get("lora")()), "fp32")
    with pytest.raises(UserError, match=f"{method} does not start as its parent"):
        choose_parent_mode(parent, adapters.get(method)(), OnParent.auto, None, OnPrecisionChange.refuse)


def test_a_prefix_is_refused_where_a_window_forgets_it():
    config = {"model_type": "mistral", **SMALL, "sliding_window": 32, "max_position_embeddings": 64}
    assert "forgets a prefix" in str(adapters.get("prefix")(num_virtual_tokens=4).check(config)[0])
    assert not adapters.get("prompt")(num_virtual_tokens=4).check(config)
    assert not adapters.get("prefix")(num_virtual_tokens=4).check({**config, "sliding_window": None})
    network = adapters.get("prefix")(num_virtual_tokens=4, reparametrisation=8).check(
        {**config, "sliding_window": None}
    )
    assert "set adapter.init=random" in str(network[0])


def test_a_text_is_cut_or_repeated(tmp_path):
    """The tokens of the text stand in the places; the tokenizer is the base's own."""
    found = bases()
    for count in (3, 40):
        adapter = adapters.get("prompt")(num_virtual_tokens=count, init=Init.text, init_text="the lion and the owl")
        tree = adapter.attach(found.root(Load.fp32).tree(), trainable=True)
        ids = tiny_tokenizer()("the lion and the owl")["input_ids"]
        expected = tree.get_input_embeddings()(torch.tensor((ids * 9)[:count]))
        assert torch.equal(tree.lead.prompt_embeddings, expected)


def test_the_start_is_drawn_from_the_vocabulary_unless_random():
    for init, drawn in ((Init.vocabulary, True), (Init.random, False)):
        adapter = adapters.get("prompt")(num_virtual_tokens=6, init=init)
        tree = adapter.attach(bases().root(Load.fp32).tree(), trainable=True)
        table = tree.get_input_embeddings().weight
        found = [bool((table == row).all(-1).any()) for row in tree.lead.prompt_embeddings]
        assert found == [drawn] * 6
