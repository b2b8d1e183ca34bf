"""Roles under lm-evaluation-harness's interface: the numbers of its own HFLM, for every kind of method."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="lm_eval comes with the extra [eval]")

from align.config.schema import Load
from align.evaluation.harness_model import RoleModel, _watch
from align.inference.open_batch import Row, RowSampling
from align.roles import Role
from data_prep.core.errors import UserError
from data_prep.rendering.renderer import Renderer
from tests.tiny import tiny_tokenizer
from tests.tiny_chain import bases, fresh, logits

PAIRS = [
    ("say the owl", " lion"),
    ("say the owl", " the tall band"),
    ("say the owl", " yell"),
    ("", "and then you all"),
    ("and you, all of thee ", "sand"),
    ("x " * 300, "the end"),
    ("q", "a" * 40),
]
TEXTS = ["the tall lion and the owl", "a", "yell and bell " * 60]


def asked(*args: Any) -> Any:
    """A request as the library makes them."""
    return SimpleNamespace(args=args, task_name="t")


def model_of(role: Role, room: int = 256, batch_size: int = 3) -> RoleModel:
    return RoleModel(
        role, Renderer(tiny_tokenizer()), room, batch_size, lambda parts, work: [work(one) for one in parts]
    )


@pytest.fixture(scope="module")
def lora() -> Role:
    return fresh("lora", Load.fp32).freeze()


@pytest.fixture(scope="module")
def theirs() -> Any:
    """The library's own class over the same LoRA, merged into plain weights."""
    from lm_eval.models.huggingface import HFLM

    merged = fresh("lora", Load.fp32, found=bases()).freeze().carrier.merge_and_unload()
    merged.set_attn_implementation("eager")
    merged.generation_config.eos_token_id = merged.config.eos_token_id
    return HFLM(pretrained=merged, tokenizer=tiny_tokenizer(), batch_size=1, device="cpu")


def test_log_likelihoods_are_those_of_the_library_on_merged_weights(lora: Role, theirs: Any) -> None:
    requests = [asked(*pair) for pair in PAIRS]
    ours, wanted = model_of(lora).loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
    for (value, greedy), (other, same) in zip(ours, wanted, strict=True):
        assert value == pytest.approx(other, abs=1e-4)  # merging and packing round otherwise, float32
        assert greedy == same


def test_rolling_log_likelihoods_are_those_of_the_library(lora: Role, theirs: Any) -> None:
    requests = [asked(text) for text in TEXTS]
    ours, wanted = model_of(lora).loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests)
    assert ours == pytest.approx(wanted, abs=1e-3)  # sums of up to 700 tokens, in windows of 256


def test_replies_are_those_of_the_library(lora: Role, theirs: Any) -> None:
    settings = {"until": ["\n", "th"], "max_gen_toks": 12, "do_sample": False}
    requests = [asked(text, dict(settings)) for text in ("say the owl", "and", "the tall band " * 20, "lion")]
    wanted = theirs.generate_until([asked(*one.args) for one in requests], disable_tqdm=True)
    assert model_of(lora).generate_until(requests) == wanted


def test_stop_words_end_a_reply_and_are_no_part_of_it(lora: Role) -> None:
    model = model_of(lora)
    whole = model.generate_until([asked("say the owl", {"until": [], "max_gen_toks": 12})])[0]
    assert len(whole) > 4, "the tiny model has something to say"
    stop = whole[2:4]
    assert model.generate_until([asked("say the owl", {"until": [stop], "max_gen_toks": 12})]) == [
        whole[: whole.index(stop)]
    ]


def test_a_reply_leaves_the_batch_with_its_stop_word() -> None:
    row = Row([5], RowSampling(100, frozenset({1})), np.random.default_rng(0))
    grew = _watch(row, ["tall", ""], lambda ids: tiny_tokenizer().decode(ids))
    for number, token in enumerate(tiny_tokenizer().encode("x" * 200 + " tall")):
        assert not row.left, number
        row.reply.ids.append(token)
        grew()
    assert row.left


@pytest.mark.parametrize(("method", "load"), [("prefix", Load.fp32), ("bottleneck", Load.fp32), ("qlora", Load.nf4)])
def test_any_method_gives_what_its_rows_give_alone(method: str, load: Load) -> None:
    role = fresh(method, load).freeze()
    model = model_of(role, room=200)
    found = model.loglikelihood([asked(*pair) for pair in PAIRS[:3]])
    for (context, continuation), (value, _) in zip(PAIRS[:3], found, strict=True):
        before, after = model._encode_pair(context, continuation)
        assert value == pytest.approx(alone(role, before, after), abs=2e-3)


def alone(role: Role, before: Sequence[int], after: Sequence[int]) -> float:
    """The log-probability of a continuation, from one plain row."""
    logprob_NV = torch.log_softmax(logits(role, [[*before, *after]]), dim=-1)
    places = torch.arange(len(before) - 1, len(before) + len(after) - 1)
    return float(logprob_NV[places, torch.tensor(after)].sum())


def test_samples_and_replies_without_room_are_refused(lora: Role) -> None:
    with pytest.raises(UserError, match="asks for samples"):
        model_of(lora).generate_until([asked("a", {"until": [], "do_sample": True, "temperature": 0.8})])
    with pytest.raises(UserError, match="room for 20"):
        model_of(lora, room=20).generate_until([asked("a", {"until": [], "max_gen_toks": 20})])


def test_chat_templates_are_the_tokenizers() -> None:
    model = model_of(fresh("lora", Load.fp32).freeze())
    turns = [{"role": "user", "content": "hi"}]
    assert model.apply_chat_template(turns) == "<|user|>hi<|end|>\n<|assistant|>"
