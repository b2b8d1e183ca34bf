"""`adapter.trainable_tokens`: rows of new tokens are trained beside LoRA, along a chain, and come out with it."""

from __future__ import annotations

import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

from align.adapters.token_rows import token_rows
from align.checkpoints.compatibility import ParentMode, options_of
from align.config.compose import compose
from align.config.registries import adapters
from align.config.schema import Load
from align.inference.forms import Form
from align.planning.check import check
from align.roles import Role
from align.weights.export import export
from align.weights.merge import merge
from align.weights.options import ExportOptions, MergeOptions
from data_prep.core.errors import UserError
from tests.tiny_chain import base, bases, execute, logits, made, pipeline_words, read, sentences, stirred

TOKENS = ["<|user|>", "<|end|>"]
IDS = [1, 2]
ASKED = [[2, *ids, 1] for ids in sentences()]


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """The tiny base with an output head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    shutil.copytree(base(), folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(base(), dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0))
    model.save_pretrained(folder)
    return folder


def role_on(folder, load=Load.fp32) -> tuple[Role, object]:
    found = bases(folder)
    adapter = adapters.get("lora")(trainable_tokens=TOKENS, target_modules=["q_proj"])
    return stirred(found.fresh(None, adapter, ParentMode(None, load), "policy")), found.root(load)


def test_rows_of_embedding_and_own_head_are_trained_kept_and_merged(untied, tmp_path):
    from peft import PeftModel

    role, root = role_on(untied)
    assert role.adapter.count(read(untied / "config.json")).trainable == sum(
        p.numel() for p in role.parameters() if p.requires_grad
    )
    role.adapter.save(role.carrier, tmp_path)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32), str(tmp_path))
    with torch.no_grad():
        theirs = torch.cat([stock(input_ids=torch.tensor([ids])).logits[0] for ids in ASKED])
    torch.testing.assert_close(theirs, logits(role, ASKED), rtol=0, atol=2e-5)
    merged = role.adapter.merge(role.adapter.load(root.private(), tmp_path, trainable=False))
    torch.testing.assert_close(logits(Role("m", merged, None), ASKED), logits(role, ASKED), rtol=0, atol=1e-5)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        moved = (merged.get_parameter(name) != root.model.get_parameter(name)).any(dim=1)
        assert moved.nonzero().flatten().tolist() == IDS, name


def test_rows_are_trained_in_float32_on_a_base_in_bfloat16():
    role, _ = role_on(base(), Load.bf16)
    rows = {name: p for name, p in role.named_parameters() if "trainable_tokens" in name}
    assert rows and all(p.dtype is torch.float32 and p.requires_grad for p in rows.values())


def test_a_chain_trains_them_in_every_stage_and_gives_them_away(tmp_path):
    words = ["adapter=lora", "adapter.trainable_tokens=['<|user|>','<|end|>']", "adapter.target_modules=[q_proj]"]
    run = made("rlhf", *words, out=tmp_path, without="evaluate")
    kept = {stage: load_file(run / stage / "adapter_model.safetensors") for stage in ("sft", "reward_model", "ppo")}
    (name,) = [name for name in kept["sft"] if "trainable_tokens" in name]
    own = load_file(base() / "model.safetensors")["model.embed_tokens.weight"][IDS]
    rows = [own, kept["sft"][name], kept["ppo"][name]]
    assert all((second != first).any(dim=1).all() for first, second in pairwise(rows))
    assert not torch.equal(kept["reward_model"][name], kept["sft"][name])
    assert read(run / "run.json")["stages"][2]["metrics"]["step0"]["kl"] <= 1e-5
    assert merge(str(run / "ppo"), MergeOptions(to=str(tmp_path / "merged")))["drift"]["kl"] <= 1e-6
    assert export(str(run / "ppo"), ExportOptions(to=str(tmp_path / "peft")))["form"] == "peft"
    with pytest.raises(UserError, match="its change is no low-rank sum"):
        export(str(run / "ppo"), ExportOptions(to=str(tmp_path / "lora"), form=Form.lora))


def test_what_cannot_be_is_one_line():
    tree = bases().root(Load.fp32).tree()
    with pytest.raises(
        UserError, match=r"no token '<\|usr\|>' \(did you mean '<\|user\|>'\?\); add it to the tokenizer"
    ):
        token_rows(tree, ["<|usr|>"])
    tree.get_output_embeddings().bias = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(UserError, match="output head has a bias"):
        token_rows(tree, TOKENS)


@pytest.mark.parametrize(("folder", "said"), [("base", "no token '<|usr|>'"), ("biased", "output head has a bias")])
def test_what_cannot_be_is_refused_before_anything_is_trained(folder, said, tmp_path):
    model, token = base(), "<|usr|>"
    if folder == "biased":  # as Phi's head has
        model, token = Path(shutil.copytree(base(), tmp_path / "model")), "<|user|>"
        config = PhiConfig(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        )
        PhiForCausalLM(config).save_pretrained(model)
    more = ["adapter=lora", f"adapter.trainable_tokens=['{token}']", f"out={tmp_path / 'runs'}"]
    config = compose(pipeline_words("rlhf", *more, model=model))
    problems = {problem.stage: str(problem) for problem in check(config).problems if problem.severity == "error"}
    assert [*problems] == ["sft", "reward_model", "ppo"] and all(said in line for line in problems.values())
    with pytest.raises(UserError, match=re.escape(said)):
        execute(config)
    assert not (tmp_path / "runs").exists()


def test_an_option_that_is_not_used_leaves_digests_as_they_were():
    assert "trainable_tokens" not in options_of(adapters.get("lora")())
    assert options_of(adapters.get("lora")(trainable_tokens=TOKENS))["trainable_tokens"] == TOKENS
