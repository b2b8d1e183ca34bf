"""Model folders that are quantised already, or of another kind: a base at the precision they are kept at, or one line.

The 4-bit folders are made by stock transformers and bitsandbytes; of the others config.json is enough, because they are
refused before a weight is read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.adapters.shapes import require_decoder
from align.config.schema import Load
from align.models.loading import inspect_weights
from align.models.quantised import kept_at
from align.models.shared_base import BaseIdentity, SharedBase
from align.planning.check import check
from align.weights.merge import merge
from align.weights.options import MergeOptions
from data_prep.core.errors import UserError
from tests.tiny import save_tiny_llama
from tests.tiny_chain import CPU, HOME, compose, made, read, refused, run, sft

FOUR_BIT = {"nf4": ("nf4", True), "nf4_single": ("nf4", False), "fp4": ("fp4", True)}


@cache
def quantised(load: str) -> Path:
    """A tiny Llama as stock transformers writes it in 4 bits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    plain = save_tiny_llama(HOME / "to-quantise", hidden=64)
    kind, double = FOUR_BIT[load]
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=asked, device_map={"": "cpu"})
    model.save_pretrained(HOME / load)
    AutoTokenizer.from_pretrained(plain).save_pretrained(HOME / load)
    return HOME / load


def with_config(tmp_path: Path, **changed: Any) -> Path:
    """A tiny base that says this of itself."""
    folder = save_tiny_llama(tmp_path / "m")
    path = folder / "config.json"
    path.write_text(json.dumps({**read(path), **changed}), "utf-8")
    return folder


@pytest.mark.parametrize("load", FOUR_BIT)
def test_a_4bit_folder_computes_what_stock_transformers_computes_with_it(load):
    from transformers import AutoModelForCausalLM

    folder = quantised(load)
    assert kept_at(read(folder / "config.json")) is Load(load)
    base = SharedBase.open(folder, BaseIdentity("tiny", None, "0"), Load(load), CPU)
    stock = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = torch.tensor([[5, 9, 40, 7, 77, 130]])
    base.model.set_attn_implementation("eager")
    torch.testing.assert_close(base.model(ids).logits, stock(ids).logits, rtol=0, atol=1e-5)
    plain = base.private()  # and in float32, the same function
    torch.testing.assert_close(plain(ids).logits, stock(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("words", [("adapter=lora", "model.load=nf4"), ("adapter=qlora",)], ids=["lora", "qlora"])
def test_nf4_is_trained_on_and_merging_dequantises(tmp_path, words):
    folder = made("sft", *words, out=tmp_path, model=quantised("nf4"))
    assert read(folder / "sft" / "checkpoint.json")["load"] == "nf4"
    written = merge(str(folder / "sft"), MergeOptions(to=str(tmp_path / "merged")))
    assert written["drift"]["kl"] < 1e-5
    assert "quantization_config" not in read(tmp_path / "merged" / "config.json")


@pytest.mark.parametrize(
    ("kept", "words", "said"),
    [
        ("nf4", ("adapter=lora",), "quantised to nf4 already and cannot be loaded as fp32; set model.load=nf4, or"),
        ("nf4", ("adapter=full",), "cannot be loaded as fp32"),
        ("nf4", ("model.load=bf16",), "cannot be loaded as bf16"),
        ("nf4_single", ("adapter=qlora",), "cannot be loaded as nf4; set model.load=nf4_single, or adapter=qlora adap"),
        ("fp4", ("adapter=qlora",), "set model.load=fp4, or adapter=qlora adapter.four_bit=fp4"),
    ],
)
def test_another_precision_than_the_folders_own_is_refused_before_anything_is_loaded(
    tmp_path, capfd, kept, words, said
):
    asked = sft(tmp_path, *words, model=quantised(kept))
    assert said in refused(*run(capfd, *asked)) and not (tmp_path / "n").exists()
    assert any(said in str(problem) for problem in check(compose(asked)).problems)


def unpacked(folder: Path) -> None:
    """The weights are those of a plain base."""
    shutil.copy(save_tiny_llama(HOME / "to-quantise", hidden=64) / "model.safetensors", folder)


def without(part: str) -> Callable[[Path], None]:
    """No tensors whose names have this part."""

    def change(folder: Path) -> None:
        kept = {n: v for n, v in load_file(folder / "model.safetensors").items() if part not in n}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def called(kind: str) -> Callable[[Path], None]:
    """config.json names another type of 4 bits."""

    def change(folder: Path) -> None:
        config = read(folder / "config.json")
        config["quantization_config"]["bnb_4bit_quant_type"] = kind
        (folder / "config.json").write_text(json.dumps(config), "utf-8")

    return change


@pytest.mark.parametrize(
    ("change", "load", "said"),
    [
        (unpacked, "nf4", "says that its weights are quantised to nf4, but none is packed"),
        (
            without("layers.0.self_attn.q_proj.weight."),
            "nf4",
            "1 have no state of nf4 (first: model.layers.0.self_attn.q",
        ),
        (called("fp4"), "fp4", "quantised to fp4, but 14 have no state of fp4"),
        (without("layers.1.mlp"), "nf4", "cannot be read as a llama"),
        (without("q_proj.weight.absmax"), "nf4", "cannot be read as a llama"),
    ],
    ids=["plain weights", "no state", "another type", "layers missing", "no scales"],
)
def test_a_damaged_4bit_folder_is_refused(tmp_path, change, load, said):
    folder = Path(shutil.copytree(quantised("nf4"), tmp_path / "m"))
    change(folder)
    for open_it in (inspect_weights, lambda one: SharedBase.open(one, BaseIdentity("t", None, "0"), Load(load), CPU)):
        if open_it is inspect_weights and "cannot be read" in said:
            continue  # only its shapes would tell
        with pytest.raises(UserError) as caught:
            open_it(folder)
        assert said in str(caught.value), str(caught.value)


OTHERS = {
    "bitsandbytes 8-bit": {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
    "gptq, 4 bits": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq, 4 bits": {"quant_method": "awq", "bits": 4},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "mxfp4": {"quant_method": "mxfp4"},
    "bitsandbytes 4-bit stored as bfloat16": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": "bfloat16",
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_quantisations_are_refused_by_name(tmp_path, capfd, name):
    asked = sft(
        tmp_path, "adapter=lora", "model.load=nf4", model=with_config(tmp_path, quantization_config=OTHERS[name])
    )
    assert f"quantised by {name}, which" in refused(*run(capfd, *asked))
    assert any(f"quantised by {name}, which" in str(problem) for problem in check(compose(asked)).problems)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("bert", "a bert is no causal language model"),
        ("roberta", "a roberta is no causal language model"),
        ("bart", "a bart is no causal language model"),
        ("clip", "a clip is no causal language model"),
        ("qwen2_vl", "a qwen2_vl is no causal language model"),
        ("mamba", "architecture mamba is not supported (a state runs on from row to row)"),
        ("jamba", "architecture jamba is not supported (a state runs on from row to row)"),
    ],
)
def test_other_architectures_are_told_from_their_config(kind, said):
    with pytest.raises(UserError) as caught:
        require_decoder({"model_type": kind})
    assert str(caught.value).startswith(said)


def test_folders_of_another_kind_are_refused_by_what_they_are(tmp_path, capfd):
    folder = with_config(tmp_path, model_type="t5", architectures=["T5ForConditionalGeneration"])
    assert "a t5 is no causal language model" in refused(*run(capfd, *sft(tmp_path, model=folder)))
    (folder / "config.json").unlink()
    assert "config.json is missing" in refused(*run(capfd, *sft(tmp_path, model=folder)))
    (folder / "adapter_config.json").write_text("{}", "utf-8")
    assert "holds an adapter and no model" in refused(*run(capfd, *sft(tmp_path, model=folder)))


@pytest.mark.parametrize("verb", ["run", "check"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer in this folder"),
        (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "no tokenizer in this folder"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"model": {"type": "B', "utf-8"), "tokenizer"),
    ],
    ids=["no words", "no files", "damaged"],
)
def test_a_folder_without_a_tokenizer_is_one_line(tmp_path, capfd, verb, change, said):
    from align.cli.dispatch import main

    folder = Path(shutil.copytree(save_tiny_llama(tmp_path / "m"), tmp_path / "bare"))
    change(folder)
    capfd.readouterr()
    code = main([verb, *sft(tmp_path, model=folder)])
    out, err = capfd.readouterr()
    assert code == 2 and said in out + err and "Traceback" not in out + err
