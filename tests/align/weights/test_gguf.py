"""`align ship to=gguf`: a reader that is not ours finds the model in the file; what is not covered is named."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from align.cli.dispatch import main
from data_prep.core.errors import UserError
from tests.tiny import tiny_tokenizer
from tests.tiny_chain import finished, refused

pytest.importorskip("gguf")

import gguf

from align.weights import gguf_file
from align.weights.gguf_tokenizer import add_tokenizer, splitting
from align.weights.options import Precision

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_ROPE = {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}, "rms_norm_eps": 1e-4}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_AFTER = {**_BYTES, "use_regex": False}
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_3 = _QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def split_at(regex: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def written(monkeypatch, folder, config, precision=Precision.fp32):
    """A model of random weights, biases and norms, and its file."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter)
    monkeypatch.setattr(gguf_file, "merged_model", lambda opened: model)
    checkpoint, renderer = SimpleNamespace(label="run/sft"), SimpleNamespace(end_token_id=1)
    opened = SimpleNamespace(checkpoint=checkpoint, renderer=renderer, tokenizer=tiny_tokenizer())
    gguf_file.write_gguf(opened, folder, precision)
    return model


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (LlamaConfig, {}),
        (LlamaConfig, {"head_dim": 24, "tie_word_embeddings": True}),
        (Qwen2Config, {}),
        (Qwen3Config, {"head_dim": 24}),
    ],
)
def test_transformers_reads_the_same_model_from_it(kind, more, tmp_path, monkeypatch):
    config = kind(vocab_size=len(tiny_tokenizer()) + 3, **_SIZES, **_HEADS, **_ROPE, **more)
    model = written(monkeypatch, tmp_path, config)
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        torch.testing.assert_close(gguf_file.opened_by_transformers(tmp_path)(ids).logits, model(ids).logits)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[:2] == ["<|pad|>", "<|end|>"] and tokens[-1] == f"[PAD{config.vocab_size - 1}]"
    assert ("output.weight" in {t.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}) != bool(
        config.tie_word_embeddings
    )


def test_rows_of_queries_and_keys_change_places():
    """Two heads of four channels: a channel and the one half a head behind it become neighbours."""
    rows = torch.arange(8)[:, None].numpy()
    assert gguf_file.neighbouring(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_what_fp16_cannot_hold_is_refused(tmp_path, monkeypatch):
    config = LlamaConfig(vocab_size=len(tiny_tokenizer()), **_SIZES, **_HEADS)
    model = written(monkeypatch, tmp_path, config, Precision.fp16)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == "F16" and types["output_norm.weight"] == "F32"
    model.lm_head.weight.data[0, 0] = 70000.0
    with pytest.raises(UserError, match=r"fp16 cannot hold output.weight; use load=fp32"):
        gguf_file.write_gguf(
            SimpleNamespace(checkpoint=None, renderer=None, tokenizer=None), tmp_path / "x", Precision.fp16
        )


@pytest.mark.parametrize(
    ("steps", "model", "name"),
    [
        ([_BYTES], {}, "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, _BYTES], {}, "smollm"),
        ([split_at(_QWEN), _AFTER], {}, "qwen2"),
        ([split_at(_LLAMA_3), _AFTER], {"ignore_merges": True}, "llama-bpe"),
        ([split_at(_LLAMA_3), _AFTER], {}, "merges in another order"),
        ([_BYTES], {"ignore_merges": True}, "merges in another order"),
        ([split_at(r"\s+"), _AFTER], {}, "does not split text"),
        ([split_at(_QWEN), _BYTES], {}, "does not split text"),
        ([{**_BYTES, "add_prefix_space": True}], {}, "does not work on bytes"),
        ([{"type": "Metaspace"}], {}, "does not work on bytes"),
        ([_BYTES], {"byte_fallback": True}, "no plain byte-level BPE"),
        ([_BYTES], {"type": "Unigram"}, r"no plain byte-level BPE \(Unigram\)"),
    ],
)
def test_a_tokenizer_is_known_by_how_it_splits_or_refused(steps, model, name):
    parts = {"model": {"type": "BPE", **model}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    if " " not in name:
        assert splitting(parts) == name
    else:
        with pytest.raises(UserError, match=name):
            splitting(parts)


def test_tokens_that_llama_cpp_would_read_otherwise_are_refused():
    writer = gguf.GGUFWriter(None, "llama")
    with pytest.raises(UserError, match=r"has \d+ tokens, and its embedding 100 rows"):
        add_tokenizer(writer, tiny_tokenizer(), 1, 100)
    lowered = {"model": {"type": "BPE"}, "pre_tokenizer": _BYTES, "normalizer": {"type": "Lowercase"}}
    with pytest.raises(UserError, match=r"normalises text \(Lowercase\)"):
        splitting(lowered)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"model_type": "gpt2"}, "the architecture gpt2 is not covered"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "llama3"}}, "of the kind llama3"),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "yarn"}}, "of the kind yarn"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding window"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias is not covered"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "gelu is not covered"),
    ],
)
def test_an_architecture_that_is_not_covered_is_refused_by_name(config, line, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(UserError, match=f"no GGUF of this model: .*{line}.*; to=folder"):
        gguf_file.require_covered(SimpleNamespace(base_folder=tmp_path, tokenizer=None))


def test_the_chain_is_shipped_as_one_file(tmp_path, capfd):
    target = str(finished() / "sft")
    assert main(["ship", target, "to=gguf", "load=fp16", f"folder={tmp_path}/x"]) == 0
    out = capfd.readouterr().out
    assert "to=gguf, as gguf: merged weights, tokenizer and chat template in one file" in out and "KL" in out
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"model.gguf", "README.md", "align_export.json"}
    fields = gguf.GGUFReader(tmp_path / "x" / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2" and not fields["tokenizer.ggml.add_bos_token"].contents()
    assert fields["tokenizer.chat_template"].contents() == tiny_tokenizer().chat_template
    assert "llama-server -m model.gguf --jinja" in (tmp_path / "x" / "README.md").read_text("utf-8")
    capfd.readouterr()
    code = main(["ship", target, "to=gguf", "load=bf16", f"folder={tmp_path}/y"])
    assert "load: to=gguf is written at fp32 or fp16" in refused(code, capfd.readouterr().err)
