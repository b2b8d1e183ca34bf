"""Which modules are made our own, that results stay, and that `plain` leaves everything as the libraries have it."""

from __future__ import annotations

import pytest
import torch

from align.adapters.layers.lora_offset import lora_layers
from align.adapters.layers.own_linear import is_own
from align.adapters.lora import Init
from align.config.schema import Load
from align.models.own_modules import _Gate, _Norm, take_out
from align.roles import Bases, chosen_logprobs
from align.training.objectives import LanguageModeling
from data_prep.types import Tokens
from tests.architectures import folder
from tests.tiny_chain import base, bases, fresh, sentences

OWN = {
    "llama": (5, 2),
    "qwen3": (9, 2),
    "mistral": (5, 2),
    "phi3": (5, 0),  # one fused projection for gate and up
    "gemma": (0, 0),  # 1 + weight, and gelu
    "gemma2": (0, 0),
    "olmo2": (0, 2),  # multiplies in float32 before it rounds
    "gpt2": (0, 0),
}
"""Norms and SwiGLU layers of two layers."""


def plain_bases() -> Bases:
    found = bases()
    found.plain = True
    return found


@pytest.mark.parametrize("name", OWN)
def test_modules_that_compute_the_same_are_made_our_own(name):
    tree = bases(folder(name)).root(Load.fp32).tree()
    kinds = [isinstance(module, kind) for kind in (_Norm, _Gate) for module in tree.modules()]
    found = tuple(sum(isinstance(module, kind) for module in tree.modules()) for kind in (_Norm, _Gate))
    assert found == OWN[name] and any(kinds) == any(OWN[name])
    names = [type(module).__name__ for module in tree.modules()]
    take_out(tree)
    assert not any(isinstance(module, _Norm | _Gate) for module in tree.modules())
    assert [type(module).__name__ for module in tree.modules()] == names


def test_plain_leaves_everything_as_it_was():
    tree = fresh("lora", Load.fp32, plain_bases()).tree
    assert not any(isinstance(module, _Norm | _Gate) or is_own(module) for module in tree.modules())
    private = plain_bases().root(Load.fp32).private()
    assert not any(isinstance(module, _Norm | _Gate) for module in private.modules())


@pytest.mark.parametrize("method", ["lora", "pissa", "lora_fa", "lora_plus", "adalora", "delta_lora", "qlora"])
def test_every_low_rank_layer_is_our_own_after_reading_too(method, tmp_path):
    load = Load.nf4 if method == "qlora" else Load.fp32
    options = {"init": Init.pissa} if method == "pissa" else {}
    role = fresh("lora" if method == "pissa" else method, load, **options)
    role.adapter.save(role.carrier, tmp_path)
    for carrier in (role.carrier, *(role.adapter.load(bases().root(load).tree(), tmp_path, x) for x in (True, False))):
        layers = lora_layers(carrier)
        assert len(layers) == 14 and all(is_own(layer) for layer in layers.values())


CASES = [
    ("lora", Load.fp32, {}),
    ("lora", Load.fp32, {"dora": True}),
    ("lora", Load.fp32, {"init": Init.pissa}),
    ("lora", Load.bf16, {}),
    ("lora_fa", Load.fp32, {}),
    ("adalora", Load.fp32, {}),
    ("delta_lora", Load.fp32, {}),
    ("qlora", Load.nf4, {}),
    ("full", Load.fp32, {}),
    ("vera", Load.fp32, {}),
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("method", "load", "options"), CASES, ids=lambda x: getattr(x, "value", str(x)))
def test_loss_and_gradients_stay(method, load, options, checkpointing):
    rows = [Tokens(ids, [i > 1 for i in range(len(ids))], "r") for ids in sentences(6)]
    found = []
    for where in (bases(), plain_bases()):
        role = fresh(method, load, where, **options)
        if checkpointing:
            role.tree.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        objective = LanguageModeling(role).train()
        loss, _ = objective(objective.collate(rows))
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in role.named_parameters() if p.grad is not None}))
    close = {"rtol": 2e-2, "atol": 2e-1} if load is Load.bf16 else {"rtol": 1e-4, "atol": 1e-5}
    (one, own), (two, plain) = found
    torch.testing.assert_close(one, two, rtol=1e-2 if load is Load.bf16 else 1e-5, atol=0)
    assert own.keys() == plain.keys() and len(own) > 0
    for name, gradient in own.items():
        torch.testing.assert_close(gradient, plain[name], **close)


def test_a_soft_cap_stays_with_automatic_gradients_and_a_trained_head_does_not():
    from align.models.forward import linear_head

    assert linear_head(bases(folder("gemma2")).root(Load.fp32).tree()) is None
    assert linear_head(fresh("full", Load.fp32).tree) is not None, "a trained head computes as the frozen one does"
    assert linear_head(fresh("lora", Load.fp32, plain_bases()).tree) is None
    scaled = bases(folder("granite")).root(Load.fp32).tree()
    assert linear_head(scaled)[2] == 0.25
    role = fresh("lora", Load.fp32)
    hidden, targets = torch.randn(3, role.tree.config.hidden_size), torch.tensor([4, 5, 6])
    logits = role.logits(hidden) / 0.7
    expected = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(chosen_logprobs(role, hidden, targets, 0.7), expected)


def test_the_option_reaches_the_run(tmp_path):
    """`model.plain=true` is part of what decides a result; without it digests stay what they were."""
    from align.config.compose import compose

    words = ["pipeline=sft", "model=hf", f"model.path={base()}", "data=files"]
    assert compose([*words, "model.plain=true"]).model.plain and not compose(words).model.plain
