"""Architectures through the real pipeline: SFT, reward model and PPO with LoRA, and what low-rank terms do on each."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from align.checkpoints.checkpoint import Checkpoint
from align.config.schema import Load
from align.models.low_rank import merge, stack
from align.roles import Role
from tests.architectures import CHAINED, folder
from tests.tiny_chain import bases, fresh, grid_beyond, logits, made, read, sentences

KINDS = ("gpt2", "gpt_oss")
"""One of each kind of layer beside plain ones, which every other chain of the tests has: transposed and fused, experts
with sinks."""


EACH = pytest.mark.parametrize("name", grid_beyond(CHAINED, KINDS))
SHORT = ["adapter.rank=4", "stages.reward_model.on_parent=stack", "stages.ppo.on_parent=continue"]


@cache
def chain(name: str) -> Path:
    """SFT, a reward model stacked on it, and PPO that continues it, all with LoRA."""
    words = [f"name={name}", "adapter=lora", *SHORT, "stages.ppo.updates=1", "stages.ppo.critic_warmup=0"]
    return made("rlhf", *words, model=folder(name), without="evaluate")


@EACH
def test_the_whole_chain_runs_and_all_checks_of_step_0_pass(name):
    run = chain(name)
    record = read(run / "run.json")
    assert record["status"] == "done" and [s["status"] for s in record["stages"]] == ["done"] * 3
    assert [s["on_parent"] for s in record["stages"]] == [None, "stack", "continue"]
    step0 = record["stages"][2]["metrics"]["step0"]
    assert step0["kl"] <= 1e-6 and step0["ratio_dev"] <= 1e-5 and step0["rollout_gap"] <= 1e-4
    assert step0["reward_parity"] <= 1e-5 and step0["grad_roles"] == ["policy", "value"]
    assert all(check["ok"] for check in Checkpoint.open(run / "ppo").verify())


@torch.no_grad()
def rows_of(model) -> torch.Tensor:
    """A stock model's logits of every row, one by one."""
    return torch.cat([model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in sentences()])


@EACH
def test_stock_peft_loads_our_adapter_and_gives_equal_logits(name):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    saved = chain(name) / "sft"
    plain = AutoModelForCausalLM.from_pretrained(folder(name), dtype=torch.float32, attn_implementation="eager")
    theirs = rows_of(PeftModel.from_pretrained(plain, str(saved)).eval())
    role = bases(folder(name)).realise(Checkpoint.open(saved), "policy", Load.fp32)
    size = max(1.0, float(theirs.abs().max()))
    assert float((logits(role) - theirs).abs().max()) <= 1e-5 * size  # fp32 sums in another order


@EACH
@pytest.mark.parametrize("load", [Load.fp32, Load.nf4], ids=lambda load: load.value)
def test_terms_are_stacked_and_merged_exactly(name, load):
    """Fused and transposed layers too: the term of a square Conv1D added untransposed would pass every shape check."""
    found = bases(folder(name))
    role = fresh("lora", load, found, rank=4)
    terms = role.adapter.low_rank_terms(role.carrier)
    stacked, private = found.root(load).tree(), found.root(load).private()
    stack(stacked, terms)
    merge(private, terms)
    bare = logits(Role("bare", found.root(load).tree(), None))
    wanted = logits(role)
    assert float((wanted - bare).abs().max()) > 1e-3
    for tree in (stacked, private):
        torch.testing.assert_close(logits(Role("policy", tree, None)), wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", grid_beyond(["llama", "gpt2", "gemma2", "phi3", "gpt_neox", "mixtral", "opt"], KINDS))
def test_a_chain_on_four_bits(name):
    """QLoRA's chain on each kind of layer; PPO's own checks run inside."""
    words = [f"name={name}-nf4", "adapter=qlora", *SHORT[:2], "stages.ppo.updates=1", "stages.ppo.critic_warmup=0"]
    run = made("rlhf", *words, model=folder(name), without="evaluate")
    stages = read(run / "run.json")["stages"]
    assert {stage["load"] for stage in stages} == {"nf4"}
    assert stages[2]["metrics"]["step0"]["kl"] <= 1e-6
