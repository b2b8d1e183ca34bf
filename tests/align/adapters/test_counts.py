"""Published parameter counts, by closed form from a configuration: no weight is made.

Papers that name millions are given as the numbers that their formulas make; where a number of a paper does not
follow from its formula, the formula's is here. Heads are never counted.
"""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from align.adapters.bottleneck import Placement
from align.adapters.lora import Init as LoraInit
from align.adapters.shapes import base_parameters
from align.adapters.soft_prompt import Init as SoftInit
from align.cli.dispatch import main
from align.config.registries import adapters
from align.config.schema import Load
from tests.tiny_chain import base, fresh, read, refused, sft

QV = ["q_proj", "v_proj"]
LLAMA_3B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
ROBERTA = {"model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
ROBERTA_BASE = {
    **ROBERTA,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
ROBERTA_LARGE = {
    **ROBERTA,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
GPT2_M = {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16}
GPT2_L = {"model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20}
GPT3 = {"model_type": "opt", "hidden_size": 12288, "num_hidden_layers": 96, "num_attention_heads": 96, "ffn_dim": 49152}
GPT3 |= {"vocab_size": 50257, "word_embed_proj_dim": 12288, "max_position_embeddings": 2048}
WORDS = ["query", "value"]

# GPT-3's numbers are those of "LoRA" (arXiv 2106.09685, table 4), the rest those of peft's method comparison and of
# table 1 to 6 of VeRA, LoRA-FA and LoRA. Not reproduced, as their papers' own formulas do not give them: GPT-2 with
# LoRA r 4 (0.35M and 0.77M), GPT-3 with VeRA r 16 and 256 (2.8M and 8.7M), GPT-3 PreLayer 8+8 (20.2M).

PUBLISHED: list[tuple[dict[str, Any], str, dict[str, Any], int]] = [
    (LLAMA_3B, "full", {}, 3_212_749_824),
    (LLAMA_3B, "lora", {"rank": 32, "target_modules": QV}, 9_175_040),
    (LLAMA_3B, "lora", {"rank": 64, "target_modules": QV}, 18_350_080),
    (LLAMA_3B, "lora", {"rank": 10, "target_modules": ["gate_proj", "up_proj", "down_proj"]}, 9_461_760),
    (LLAMA_3B, "lora", {"rank": 64, "target_modules": QV, "rslora": True}, 18_350_080),
    (LLAMA_3B, "lora_fa", {"rank": 32, "target_modules": QV}, 3_670_016),
    (LLAMA_3B, "lora", {"rank": 32, "target_modules": QV, "dora": True}, 9_289_728),
    (LLAMA_3B, "vera", {"rank": 256, "target_modules": QV}, 129_024),
    (LLAMA_3B, "prefix", {"num_virtual_tokens": 50}, 2_867_200),
    (LLAMA_3B, "prefix", {"num_virtual_tokens": 200}, 11_468_800),
    (LLAMA_3B, "prompt", {"num_virtual_tokens": 200}, 614_400),
    (LLAMA_3B, "feature_extraction", {"last_blocks": 0, "norms": True}, 175_104),
    (ROBERTA_BASE, "lora", {"rank": 8, "target_modules": WORDS}, 294_912),
    (ROBERTA_BASE, "vera", {"rank": 1024, "target_modules": WORDS}, 43_008),
    (ROBERTA_LARGE, "lora", {"rank": 8, "target_modules": WORDS}, 786_432),
    (ROBERTA_LARGE, "vera", {"rank": 256, "target_modules": WORDS}, 61_440),
    (ROBERTA_LARGE, "bottleneck", {"bottleneck_size": 64}, 3_171_840),
    (ROBERTA_LARGE, "bottleneck", {"bottleneck_size": 16}, 811_392),
    (ROBERTA_LARGE, "bottleneck", {"bottleneck_size": 64, "placement": Placement.houlsby}, 6_343_680),
    (ROBERTA_LARGE, "bottleneck", {"bottleneck_size": 8, "placement": Placement.houlsby}, 835_968),
    (ROBERTA_BASE, "vera", {"rank": 1, "target_modules": WORDS}, 18_456),
    (ROBERTA_BASE, "vera", {"rank": 16, "target_modules": WORDS}, 18_816),
    (ROBERTA_BASE, "vera", {"rank": 256, "target_modules": WORDS}, 24_576),
    (ROBERTA_BASE, "lora", {"rank": 1, "target_modules": WORDS}, 36_864),
    (ROBERTA_BASE, "lora", {"rank": 16, "target_modules": WORDS}, 589_824),
    (ROBERTA_BASE, "lora", {"rank": 256, "target_modules": WORDS}, 9_437_184),
    (LLAMA_7B, "full", {}, 6_738_415_616),
    (LLAMA_7B, "lora", {"rank": 64}, 159_907_840),
    (LLAMA_7B, "qlora", {"rank": 64}, 159_907_840),
    (LLAMA_7B, "lora_plus", {"rank": 64}, 159_907_840),
    (LLAMA_7B, "delta_lora", {"rank": 64}, 159_907_840),
    (LLAMA_7B, "lora_fa", {"rank": 64}, 87_031_808),
    (LLAMA_7B, "vera", {"rank": 1024}, 1_589_248),
    (LLAMA_7B, "vera", {"rank": 256}, 1_417_216),
    (GPT2_M, "full", {}, 354_823_168),
    (GPT2_L, "full", {}, 774_030_080),
    (GPT2_M, "vera", {"rank": 1024, "target_modules": ["c_attn"]}, 98_304),
    (GPT2_L, "vera", {"rank": 1024, "target_modules": ["c_attn"]}, 175_104),
    (GPT2_M, "bottleneck", {"bottleneck_size": 6, "own_norm": True}, 368_784),
    (GPT2_M, "bottleneck", {"bottleneck_size": 224, "own_norm": True}, 11_089_152),
    (GPT2_M, "prefix", {"num_virtual_tokens": 5}, 245_760),
    (GPT3, "lora", {"rank": 1, "target_modules": QV}, 4_718_592),
    (GPT3, "lora", {"rank": 8, "target_modules": QV}, 37_748_736),
    (GPT3, "vera", {"rank": 1, "target_modules": QV}, 2_359_488),
    (GPT3, "vera", {"rank": 256, "target_modules": QV}, 2_408_448),
    (GPT3, "prompt", {"num_virtual_tokens": 256 + 8}, 3_244_032),
    (GPT3, "bottleneck", {"bottleneck_size": 1, "placement": Placement.houlsby}, 7_078_080),
    (GPT3, "bottleneck", {"bottleneck_size": 8, "placement": Placement.houlsby}, 40_109_568),
    (GPT3, "prefix", {"num_virtual_tokens": 8}, 18_874_368),
]


LLAMA_13B = {**LLAMA_7B, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
LLAMA_13B |= {"num_attention_heads": 40, "num_key_value_heads": 40}
LLAMA_70B = {**LLAMA_7B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
LLAMA_70B |= {"num_attention_heads": 64, "num_key_value_heads": 8}
MISTRAL_7B = {**LLAMA_7B, "model_type": "mistral", "intermediate_size": 14336, "num_key_value_heads": 8}
QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072}
QWEN3 |= {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
QWEN3 |= {"tie_word_embeddings": True}
QWEN_EXPERTS = {"model_type": "qwen2_moe", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16}
QWEN_EXPERTS |= {"vocab_size": 151936, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
MIXTRAL = {**MISTRAL_7B, "model_type": "mixtral", "num_local_experts": 8}
OPT_350M = {"model_type": "opt", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
OPT_350M |= {"ffn_dim": 4096, "vocab_size": 50272, "word_embed_proj_dim": 512, "do_layer_norm_before": False}
FALCON = {"model_type": "falcon", "vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32}
FALCON |= {"num_attention_heads": 71, "multi_query": True, "parallel_attn": True, "bias": False}
PYTHIA = {"model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 1024, "intermediate_size": 4096}
PYTHIA |= {"num_hidden_layers": 24, "num_attention_heads": 16}
PHI = {"model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32}
PHI |= {"vocab_size": 51200, "num_attention_heads": 32}
DEBERTA = {"model_type": "deberta-v2", "vocab_size": 128100, "hidden_size": 768, "num_hidden_layers": 12}
DEBERTA |= {"num_attention_heads": 12, "intermediate_size": 3072}
T5 = {"model_type": "t5", "d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
T5_XL = {**T5, "d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "feed_forward_proj": "gated-gelu"}

# Numbers of model cards, of what peft prints for usual settings, of AdaLoRA's table 1 (LoRA r 8 on DeBERTa: 1.33M) and
# of IA3 on T0-3B (540K).
PUBLISHED += [
    (LLAMA_7B, "lora", {"rank": 8, "target_modules": QV}, 4_194_304),
    (LLAMA_13B, "lora", {"rank": 8, "target_modules": QV}, 6_553_600),
    (LLAMA_70B, "lora", {"rank": 8, "target_modules": QV}, 16_384_000),
    (MISTRAL_7B, "lora", {"rank": 16, "target_modules": QV}, 6_815_744),
    (MISTRAL_7B, "full", {}, 7_241_732_096),
    (QWEN3, "full", {}, 596_049_920),
    (MIXTRAL, "full", {}, 46_702_792_704),
    (MIXTRAL, "lora", {"rank": 8, "target_modules": QV}, 3_407_872),
    (QWEN_EXPERTS, "lora", {"rank": 8, "target_modules": QV}, 1_572_864),
    (QWEN_EXPERTS, "lora", {"rank": 8}, 24 * 8 * (4 * 2 * 2048 + 3 * (2048 + 5632) + 2048 + 1)),
    (OPT_350M, "full", {}, 331_196_416),
    (OPT_350M, "prompt", {"num_virtual_tokens": 10}, 5_120),
    (FALCON, "full", {}, 6_921_720_704),
    (FALCON, "lora", {"rank": 8, "target_modules": ["query_key_value"]}, 2_359_296),
    (PYTHIA, "full", {}, 405_334_016),
    (PHI, "full", {}, 2_779_683_840),
    (PHI, "bottleneck", {"bottleneck_size": 8, "placement": Placement.houlsby}, 32 * 2 * (2 * 2560 * 8 + 8 + 2560)),
    (DEBERTA, "lora", {"rank": 8}, 1_327_104),
    (T5, "full", {}, 222_903_552),
    (T5, "lora", {"rank": 8, "target_modules": ["q", "v"]}, 884_736),
    (T5_XL, "ia3", {}, 540_672),
]


@pytest.mark.parametrize(
    ("config", "method", "options", "published"),
    PUBLISHED,
    ids=[f"{c['model_type']}{c.get('num_hidden_layers', c.get('n_layer'))}-{m}-{n}" for c, m, _, n in PUBLISHED],
)
def test_published_counts(config, method, options, published):
    adapter = adapters.get(method)(**options)
    counts = adapter.count(config)
    assert counts.trainable == published
    own = 0 if adapter.traits.owns_weights else counts.trainable + counts.frozen
    assert counts.total == base_parameters(config) + own


def test_vera_brings_the_projections_that_the_paper_counts_apart():
    """22.5 million floats for Llama-2-7B at rank 1024."""
    assert adapters.get("vera")(rank=1024).count(LLAMA_7B).frozen == 1024 * (11008 + 11008)


@pytest.mark.parametrize("method", adapters.names())
def test_no_weight_is_made(method):
    """7 billion parameters would not fit into a test."""
    counts = adapters.get(method)().count(LLAMA_7B)
    assert 0 < counts.trainable <= counts.total


OPTIONS = [
    ("lora", {"rank": 4, "layers": "top_1", "target_modules": ["q_proj", "*.mlp.*"]}),
    ("lora", {"rank": 8, "rank_pattern": {"q_proj": 2, "*.layers.1.*": 5}, "dora": True}),
    ("lora", {"rank": 8, "init": LoraInit.pissa, "layers": [0]}),
    ("lora_fa", {"rank": 8, "rank_pattern": {"down_proj": 3}}),
    ("adalora", {"rank": 4, "init_rank": 7, "target_modules": "v_proj"}),
    ("delta_lora", {"rank": 4, "start_step": 2}),
    ("vera", {"rank": 12, "layers": [1]}),
    ("prefix", {"num_virtual_tokens": 3, "reparametrisation": 16, "init": SoftInit.random}),
    ("bottleneck", {"bottleneck_size": 5, "placement": Placement.houlsby, "norms": True}),
    ("bottleneck", {"bottleneck_size": 5, "placement": Placement.parallel, "own_norm": True, "layers": "top_1"}),
    ("feature_extraction", {"last_blocks": 2, "norms": True, "head": True}),
    ("ia3", {"target_modules": ["q_proj"], "feedforward": ["up_proj"], "layers": [0]}),
]


@pytest.mark.parametrize(("method", "options"), OPTIONS, ids=[f"{m}-{'-'.join(o)}" for m, o in OPTIONS])
def test_options_count_as_the_modules_that_they_make(method, options):
    role = fresh(method, Load.fp32, **options)
    counts = role.adapter.count(read(base() / "config.json"))
    assert counts.trainable == sum(p.numel() for p in role.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("config", "words", "said"),
    [
        (LLAMA_7B, ["adapter=lora", "adapter.rank=4097"], "at most the width 4096"),
        (LLAMA_7B, ["adapter=lora", "adapter.rank=0"], "adapter.rank: "),
        (
            LLAMA_7B,
            ["adapter=lora", "adapter.target_modules=[qproj]"],
            "(could match: down_proj, gate_proj",
        ),
        (LLAMA_7B, ["adapter=prefix", "adapter.num_virtual_tokens=5000"], "in a context of 4096"),
        (LLAMA_7B, ["adapter=delta_lora", "adapter.dropout=0.1"], "does not go with delta_lora"),
        ({"model_type": "mamba"}, ["adapter=prefix"], "no keys and values of a decoder"),
        (T5, ["adapter=prefix"], "no keys and values of a decoder"),
    ],
)
def test_what_cannot_be_is_not_counted(config, words, said, tmp_path, capfd):
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = main(["count", f"model.config={tmp_path}/config.json", *words])
    assert said in refused(code, capfd.readouterr().err)


@pytest.mark.parametrize("config", [T5, DEBERTA], ids=["t5", "deberta"])
def test_what_can_be_counted_only_is_not_trained(config, tmp_path, capfd):
    folder = shutil.copytree(base(), tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(config))
    for verb in ("check", "run"):
        code = main([verb, *sft(tmp_path, model=folder)])
        told = capfd.readouterr()
        assert "is no causal language model" in told.out + told.err and code == 2
    assert not (tmp_path / "n").exists()
