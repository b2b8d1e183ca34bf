"""The architectures that are tried, each as a tiny random checkpoint with the features of the real family.

One list for the tests (`tests/align/models/test_architectures.py`, `test_architecture_runs.py`) and for the table in
the documents: what it says works is run, and what it says is refused is refused for the reason it gives.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tests.tiny import tiny_tokenizer
from tests.tiny_chain import HOME

PLAIN = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}
WINDOW = {"sliding_window": 6}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True)
class Architecture:
    """One architecture: its tiny configuration, who uses it, and why it is refused if it is."""

    people: str
    """Models that have it."""
    config: dict[str, Any] = field(default_factory=dict)
    """What its configuration has besides `PLAIN`."""
    features: str = ""
    """What of the real family the tiny one has, and its tests go through; why it is refused, if it is."""
    chain: bool = False
    """Whether SFT, reward model and PPO are run on it, beyond forward passes and rollouts."""
    refused: str | None = None
    """Words of the line that refuses it."""


PACKED = "packed logits differ"
REPLACED = "attention cannot be replaced"
ARCHITECTURES = {
    "llama": Architecture(
        "Llama 2 and 3, SmolLM2, TinyLlama",
        {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
        "grouped heads, llama3 rope, tied embeddings",
        True,
    ),
    "qwen3": Architecture(
        "Qwen3", {"tie_word_embeddings": True}, "grouped heads, query and key norms, tied embeddings", True
    ),
    "mistral": Architecture("Mistral 7B", WINDOW, "grouped heads, sliding window", True),
    "gemma": Architecture("Gemma", {"num_key_value_heads": 1}, "scaled embeddings, one key head", True),
    "gemma2": Architecture(
        "Gemma 2",
        {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0, **WINDOW},
        "soft-capped scores and logits, every second layer with a sliding window",
        True,
    ),
    "gemma3_text": Architecture(
        "Gemma 3 (text)",
        {"query_pre_attn_scalar": 8, **WINDOW},
        "query and key norms, sliding windows, two ropes",
        True,
    ),
    "phi3": Architecture("Phi-3, Phi-4", {}, "fused qkv_proj and gate_up_proj", True),
    "gpt2": Architecture("GPT-2", GPT, "fused c_attn, transposed weights (Conv1D), learned positions", True),
    "gpt_neox": Architecture("Pythia, GPT-NeoX", {}, "fused query_key_value, partial rope, parallel blocks", True),
    "opt": Architecture(
        "OPT",
        {"ffn_dim": 64, "word_embed_proj_dim": 16},
        "learned positions, projected embeddings, dropout in blocks",
        True,
    ),
    "mixtral": Architecture("Mixtral", EXPERTS, "two experts", True),
    "qwen3_moe": Architecture(
        "Qwen3 30B-A3B",
        {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
        "two experts, query and key norms",
        True,
    ),
    "smollm3": Architecture("SmolLM3", {"no_rope_layers": [1, 0]}, "a layer without rope", True),
    "gpt_oss": Architecture("gpt-oss", {**EXPERTS, **WINDOW}, "attention sinks, experts, sliding windows", True),
    "qwen2": Architecture(
        "Qwen2, Qwen2.5", {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}, "biases, one windowed layer"
    ),
    "phi": Architecture("Phi-1.5, Phi-2", {}, "partial rope, parallel blocks"),
    "olmo2": Architecture("OLMo 2", {}, "norms after blocks"),
    "cohere": Architecture("Command R", {}, "scaled logits, parallel blocks"),
    "cohere2": Architecture("Command R7B", WINDOW, "sliding windows, scaled logits"),
    "granite": Architecture(
        "Granite 3",
        {"logits_scaling": 4.0, "attention_multiplier": 0.3},
        "scaled logits, a scale of its own for scores",
    ),
    "starcoder2": Architecture("StarCoder2", WINDOW, "sliding window, biases"),
    "exaone4": Architecture("EXAONE 4", WINDOW, "sliding windows, norms after blocks"),
    "biogpt": Architecture("BioGPT", {}, "learned positions"),
    "stablelm": Architecture("StableLM 2", {}, "its layers keep the row layout from attention", refused=PACKED),
    "xglm": Architecture(
        "XGLM",
        {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
        "its layers keep the row layout from attention",
        refused=PACKED,
    ),
    "codegen": Architecture("CodeGen", {**GPT, "rotary_dim": 4}, "attention of its own", refused=PACKED),
    "bloom": Architecture("BLOOM", {"n_layer": 2, "n_head": 4}, "attention of its own (ALiBi)", refused=PACKED),
    "mpt": Architecture(
        "MPT",
        {"d_model": 32, "n_heads": 4, "n_layers": 2},
        "attention of its own (ALiBi), which needs a mask",
        refused="packed rows do not pass",
    ),
    "mamba": Architecture("Mamba", {"state_size": 4}, "no attention: a state runs on from row to row", refused=PACKED),
    "gptj": Architecture("GPT-J", {**GPT, "rotary_dim": 4}, "attention of its own", refused=REPLACED),
    "gpt_neo": Architecture(
        "GPT-Neo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 6},
        "attention of its own",
        refused=REPLACED,
    ),
}
PRESETS = {
    "qwen3_0_6b": "qwen3",
    "qwen3_1_7b": "qwen3",
    "qwen3_8b": "qwen3",
    "llama32_1b": "llama",
    "llama31_8b": "llama",
    "smollm2_135m": "llama",
    "smollm2_360m": "llama",
    "smollm2_1_7b": "llama",
    "smollm3_3b": "smollm3",
    "gemma2_2b": "gemma2",
    "gemma3_1b": "gemma3_text",
    "mistral_7b": "mistral",
    "pythia_160m": "gpt_neox",
    "pythia_1_4b": "gpt_neox",
    "opt_125m": "opt",
    "opt_1_3b": "opt",
}
"""`model=NAME` -> its architecture."""
SUPPORTED = [name for name, entry in ARCHITECTURES.items() if entry.refused is None]
CHAINED = [name for name, entry in ARCHITECTURES.items() if entry.chain]


def config_of(name: str) -> dict[str, Any]:
    """The fields of an architecture's tiny config.json."""
    return {"model_type": name, "vocab_size": len(tiny_tokenizer()), **PLAIN, **ARCHITECTURES[name].config}


@cache
def folder(name: str) -> Path:
    """A tiny random model, its weights moved so that nothing is accidentally zero, one or symmetric."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_of(name))).float()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    place = HOME / "architectures" / name
    model.save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place
