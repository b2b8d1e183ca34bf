"""Every architecture is computed as transformers computes it, packed and in rollouts, or refused in one line."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from align.options import Load
from align.roles import Role
from align.rollout import RolloutEngine, Sampling
from data_prep.errors import UserError
from tests.tiny import tiny_tokenizer
from tests.tiny_chain import HOME, bases, fresh, logits, sentences

PLAIN = {
    "vocab_size": len(tiny_tokenizer()),
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
ARCHITECTURES = {
    "llama": {},
    "mistral": WINDOW,
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, **WINDOW},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0, **WINDOW},
    "gemma3_text": {"query_pre_attn_scalar": 8, **WINDOW},
    "phi": {},
    "phi3": {},
    "gpt_neox": {},
    "olmo2": {},
    "smollm3": {},
    "cohere": {},
    "cohere2": WINDOW,
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.3},
    "starcoder2": WINDOW,
    "exaone4": WINDOW,
    "stablelm": {},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, **WINDOW},
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 4},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 6},
    "codegen": {**GPT, "rotary_dim": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
    "biogpt": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "mamba": {"state_size": 4},
}
MUST_WORK = {"llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt_neox", "olmo2", "smollm3", "opt"}
EACH = pytest.mark.parametrize("name", ARCHITECTURES)


@cache
def folder(name: str) -> Path:
    """A tiny random model, its weights moved so that nothing is accidentally zero, one or symmetric."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **PLAIN | ARCHITECTURES[name])).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(HOME / "architectures" / name)
    tiny_tokenizer().save_pretrained(HOME / "architectures" / name)
    return HOME / "architectures" / name


@cache
def oracle(name: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder(name), dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def wanted(name: str, ids: list[int]) -> torch.Tensor:
    return oracle(name)(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def opened(name: str) -> Role | None:
    """The bare base as a role, or None where it is refused."""
    try:
        return Role("policy", bases(folder(name)).root(Load.fp32).tree(), None).freeze()
    except UserError as refusal:
        assert name not in MUST_WORK and "\n" not in str(refusal)
        assert name in str(refusal) or "support" in str(refusal)
        return None


@EACH
def test_packed_logits_are_those_of_each_row_alone(name):
    role = opened(name)
    if role is not None:
        rows = sentences(6, longest=20)
        expected = torch.cat([wanted(name, ids) for ids in rows])
        torch.testing.assert_close(logits(role, rows), expected, rtol=0, atol=1e-4)


@EACH
def test_rollouts_follow_the_model_beyond_its_window(name):
    """Left-padded, cached, up to 28 tokens where the window is 6: also absolute positions show here."""
    role = opened(name)
    if role is None:
        return
    prompts = sentences(6, longest=20)
    replies = RolloutEngine(role, 1, 0).generate(prompts, Sampling(8), torch.Generator().manual_seed(0))
    for prompt, reply in zip(prompts, replies, strict=True):
        forced = torch.log_softmax(wanted(name, [*prompt, *reply.ids]), -1)[len(prompt) - 1 : -1]
        forced = forced.gather(1, torch.tensor(reply.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(reply.logprobs), forced, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", sorted(MUST_WORK))
def test_adapters_attach_and_count(name):
    from align.fingerprint import read_model_config

    for method in ("lora", "vera"):
        role = fresh(method, Load.fp32, bases(folder(name)))
        counts = role.adapter.count(read_model_config(folder(name)))
        assert counts.trainable == sum(p.numel() for p in role.parameters() if p.requires_grad)
        moved = logits(role, sentences(2)) - torch.cat([wanted(name, ids) for ids in sentences(2)])
        assert float(moved.abs().max()) > 1e-3
