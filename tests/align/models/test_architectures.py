"""Every architecture is computed as transformers computes it, packed and in rollouts, or refused in one line."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from align.config.schema import Load
from align.inference.generation import RolloutEngine, Sampling
from align.models.packing import pack
from align.roles import Role
from data_prep.core.errors import UserError
from tests.architectures import ARCHITECTURES, SUPPORTED, folder
from tests.tiny_chain import bases, fresh, logits, sentences

EACH = pytest.mark.parametrize("name", ARCHITECTURES)
WORKING = pytest.mark.parametrize("name", SUPPORTED)


@cache
def oracle(name: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder(name), dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def wanted(name: str, ids: list[int]) -> torch.Tensor:
    return oracle(name)(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def opened(name: str) -> Role:
    """The bare base as a role."""
    return Role("policy", bases(folder(name)).root(Load.fp32).tree(), None).freeze()


@EACH
def test_packed_logits_are_those_of_each_row_alone_or_it_is_refused(name):
    reason = ARCHITECTURES[name].refused
    if reason is not None:
        with pytest.raises(UserError) as refusal:
            opened(name)
        said = str(refusal.value)
        assert refusal.value.code == "unsupported_architecture" and "\n" not in said
        assert f"architecture {name} is not supported" in said and reason in said
        return
    rows = sentences(6, longest=20)
    expected = torch.cat([wanted(name, ids) for ids in rows])
    torch.testing.assert_close(logits(opened(name), rows), expected, rtol=0, atol=1e-4)


@WORKING
def test_training_mode_changes_nothing_in_the_base(name):
    """Dropout hides in modules, in plain attributes (OPT) and in routers; a base has none of it."""
    role = opened(name)
    packed = pack(sentences(6, longest=20))
    still = role.hidden(packed)
    role.train()
    assert torch.equal(role.hidden(packed), still)


@WORKING
def test_rollouts_follow_the_model_beyond_its_window(name):
    """Cached, up to 28 tokens where the window is 6: also absolute positions show here. One alone needs no mask."""
    prompts, engine = sentences(6, longest=20), RolloutEngine(opened(name), 1)
    replies = engine.generate(prompts, Sampling(8), torch.Generator().manual_seed(0))
    alone = engine.generate(prompts[3:4], Sampling(8), torch.Generator().manual_seed(1))
    for prompt, reply in zip([*prompts, prompts[3]], [*replies, *alone], strict=True):
        forced = torch.log_softmax(wanted(name, [*prompt, *reply.ids]), -1)[len(prompt) - 1 : -1]
        forced = forced.gather(1, torch.tensor(reply.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(reply.logprobs), forced, rtol=0, atol=1e-4)


@WORKING
def test_adapters_attach_and_count(name):
    from align.models.fingerprint import read_model_config

    for method in ("lora", "vera"):
        role = fresh(method, Load.fp32, bases(folder(name)), rank=4)
        counts = role.adapter.count(read_model_config(folder(name)))
        assert counts.trainable == sum(p.numel() for p in role.parameters() if p.requires_grad)
        moved = logits(role, sentences(2)) - torch.cat([wanted(name, ids) for ids in sentences(2)])
        assert float(moved.abs().max()) > 1e-3
