"""Adapters that cannot be: one line, exit code 2, nothing written; `align check` says the same as `align run`."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from align.cli.dispatch import main
from tests.tiny_chain import base, pipeline_words, refused, run, sft

LITERAL = ["adapter=delta_lora", "adapter.form=literal"]
NO_LITERAL = "set model.load=fp32"
# Overrides, and what the line says; the model has width 32, two blocks and a context of 256.
BAD = {
    "rank 0": (["adapter=lora", "adapter.rank=0"], "adapter.rank: out of range (got 0; expected at least 1)"),
    "rank above": (["adapter=lora", "adapter.rank=33"], "adapter.rank: must be at least 1 and at most the width 32"),
    "rank above pattern": (["adapter=lora", "adapter.rank_pattern={q_proj: 33}"], "at most the width 32"),
    "rank above adalora": (["adapter=adalora", "adapter.rank=30"], "at most the width 32"),
    "no target": (
        ["adapter=vera", "adapter.target_modules=[qproj]"],
        "no linear layer (could match: down_proj",
    ),
    "no ia3 target": (["adapter=ia3", "adapter.feedforward=[mlp]"], "could match: down_proj"),
    "no block": (["adapter=bottleneck", "adapter.layers=top_3"], "top_1 to top_2"),
    "long prefix": (["adapter=prefix", "adapter.num_virtual_tokens=256"], "256 virtual ones in a context of 256"),
    "long prompt": (["adapter=prompt", "adapter.num_virtual_tokens=300"], "300 virtual ones in a context of 256"),
    "delta dropout": (["adapter=delta_lora", "adapter.dropout=0.1"], "adapter.dropout: does not go with delta_lora"),
    "lambda": (["adapter=delta_lora", "adapter.lambda=-1"], "adapter.lambda: out of range (got -1.0; expected"),
    "literal bf16": ([*LITERAL, "model.load=bf16"], NO_LITERAL),
    "literal nf4": ([*LITERAL, "model.load=nf4"], NO_LITERAL),
    "nothing": (["stages.sft.adapter=feature_extraction", "stages.sft.adapter.last_blocks=0"], "nothing to train"),
    "two keys": (["adapter=vera", "stages.ppo.adapter.projection_seed=3"], "adapter.projection_seed: adapters on one"),
}


@pytest.mark.parametrize(("words", "said"), BAD.values(), ids=BAD)
def test_what_cannot_be_is_one_line(words, said, tmp_path, capfd):
    overrides = [*pipeline_words("rlhf", *words), f"out={tmp_path}"]
    line = refused(*run(capfd, *overrides))
    assert said in line and not list(tmp_path.iterdir())
    assert main(["check", *overrides]) == 2
    told = capfd.readouterr()
    assert said.rpartition(": ")[2] in " ".join((told.out + told.err).split())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """An adapter made by peft alone, and its tensors."""
    folder = tmp_path_factory.mktemp("plain")
    model = AutoModelForCausalLM.from_pretrained(base(), dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    get_peft_model(model, config).save_pretrained(str(folder))
    return folder, load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda first, value: {}, "1 missing, 0 unexpected, 0 of another shape"),
        (lambda first, value: {first: value, "more": value.clone()}, "0 missing, 1 unexpected, 0 of another shape"),
        (lambda first, value: {first: value[:, :-1].contiguous()}, "0 missing, 0 unexpected, 1 of another shape"),
    ],
    ids=["missing", "extra", "misshapen"],
)
def test_adapter_files_fit_exactly(change, said, plain, tmp_path, capfd):
    folder, tensors = plain
    first = min(tensors)
    others = {name: value for name, value in tensors.items() if name != first}
    save_file({**others, **change(first, tensors[first])}, folder / "adapter_model.safetensors")
    line = refused(*run(capfd, *sft(tmp_path, f"stages.sft.init={folder}", "stages.sft.on_parent=stack")))
    assert said in line and "adapter_model.safetensors" in line
    assert not list(tmp_path.iterdir())
