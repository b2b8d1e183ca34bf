"""Attention as one kernel of rows of any length: what groups compute, on rows with shared prefixes too."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from align.models import packing, varlen
from align.models.forward import packed_hidden
from align.models.own_modules import put_in
from align.models.packing import ATTENTION, Packed, attend, pack, pack_branches
from tests.tiny import save_tiny_llama

HEADS, GROUPS, WIDTH = 6, 2, 8


def layout(seed: int) -> Packed:
    """Rows of random lengths; of three in four seeds they have prefixes with up to four branches."""
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(5, 200) for _ in range(draw.randint(low, high))]

    if seed % 4 == 0:
        return pack([tokens(1, 30) for _ in range(draw.randint(1, 9))])
    prefixes = [tokens(1, 20) for _ in range(draw.randint(1, 5))]
    return pack_branches(prefixes, [[tokens(1, 12) for _ in range(draw.randint(1, 4))] for _ in prefixes])


def given(packed: Packed, seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = [(1, heads, packed.tokens, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape, generator=draw, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_the_plain_kernel_and_groups_agree(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, within: float, window: int | None
):
    for seed in range(50):
        packed, results = layout(seed), []
        weight = torch.randn(1, packed.tokens, HEADS, WIDTH, generator=torch.Generator().manual_seed(99), dtype=dtype)
        for kernel in (None, varlen.plain):
            monkeypatch.setattr(varlen, "kernel_for", lambda *_, kernel=kernel: kernel)
            query, key, value = given(packed, seed, dtype)
            out, _ = attend(
                torch.nn.Module(), query, key, value, None, 0.3, layout=packed.layout, sliding_window=window
            )
            results.append([out, *torch.autograd.grad(out, (query, key, value), weight)])
        for groups, runs in zip(*results, strict=True):
            gap, size = (float(each.detach().abs().max()) for each in (groups - runs, groups))
            assert gap <= within * max(1.0, size), seed


def test_the_kernel_is_given_queries_that_are_the_last_of_their_keys():
    packed = pack_branches([[1, 2, 3], [4]], [[[5], [6, 7]], [[8]]])
    runs = packed.layout.runs
    assert runs is not None
    assert runs.index.tolist() == [0, 4, 6, 8, *(0, 4, 9, 11), *(0, 1, 2, 3), *(0, 1, 2, 4, 5), *(6, 7)]
    assert (runs.count, runs.longest_queries, runs.longest_keys) == (3, 4, 5)
    alone = pack([[1, 2], [3, 4, 5]]).layout.runs
    assert alone is not None and alone.index.tolist() == [0, 2, 5, 0, 2, 5], "no keys to gather"


def test_a_kernel_that_computes_something_else_is_found():
    arguments = (torch.device("cpu"), torch.bfloat16, HEADS, GROUPS, WIDTH)
    assert varlen.disagreement(varlen.plain, *arguments) == 0.0
    wrong: dict[str, varlen.Kernel] = {
        "sees all keys": lambda *a, **k: varlen.plain(*a, **{**k, "window_size": (-1, -1)}),
        "another scale": lambda *a, **k: varlen.plain(*a, **{**k, "scale": 1.0}),
        "queries are the first of their keys": _from_the_left,
        "no gradient of values": lambda q, k, v, *a, **m: varlen.plain(q, k, v.detach() + 0 * v, *a, **m),
    }
    for name, kernel in wrong.items():
        assert varlen.disagreement(kernel, *arguments) > varlen._TOLERANCE, name


def _from_the_left(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
    ends_q, ends_k = more[0].tolist(), more[1].tolist()
    firsts = [
        k_from + i
        for q_from, q_to, k_from in zip(ends_q, ends_q[1:], ends_k, strict=False)
        for i in range(q_to - q_from)
    ]
    return varlen.plain(q, k[firsts], v[firsts], more[0], more[0], *more[2:], **named)


def test_torch_takes_what_its_kernel_is_given(monkeypatch: pytest.MonkeyPatch):
    """The names, types and shapes of torch's own operator, forward and backward, on tensors without numbers."""
    from torch.nn.attention.varlen import varlen_attn

    monkeypatch.setattr(varlen, "kernel_for", lambda *_: varlen_attn)
    packed = layout(1).to(torch.device("meta"))
    shapes = [(1, heads, packed.tokens, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    tensors = [torch.empty(s, device="meta", dtype=torch.bfloat16, requires_grad=True) for s in shapes]
    assert packed.layout.runs is not None
    out = varlen.attend(packed.layout.runs, *tensors, scale=None, window=5)
    assert out is not None and out.dtype is torch.bfloat16 and out.shape == (1, packed.tokens, HEADS, WIDTH)
    for tensor, gradient in zip(tensors, torch.autograd.grad(out.sum(), tensors), strict=True):
        assert gradient.shape == tensor.shape


def test_autocast_narrows_what_the_kernel_is_given(monkeypatch: pytest.MonkeyPatch):
    asked: list[torch.dtype] = []
    monkeypatch.setattr(varlen, "kernel_for", lambda _, dtype, *more: asked.append(dtype) or varlen.plain)
    packed = layout(1)
    query, key, value = given(packed, 0, torch.float32)
    wide, _ = attend(torch.nn.Module(), query, key, value, None, layout=packed.layout)
    with torch.autocast("cpu", torch.bfloat16):
        narrow, _ = attend(torch.nn.Module(), query, key, value, None, layout=packed.layout)
    assert asked == [wide.dtype, narrow.dtype] == [torch.float32, torch.bfloat16]
    assert float((narrow - wide).abs().max().detach()) < 0.05


def test_a_device_without_it_has_no_kernel(monkeypatch: pytest.MonkeyPatch):
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    found: list[torch.dtype] = []
    monkeypatch.setattr(varlen, "disagreement", lambda kernel, device, dtype, *_: found.append(dtype) or 0.001)
    kernel_for = varlen.kernel_for.__wrapped__
    assert kernel_for(card, torch.bfloat16, 8, 2, 64) is not None and found == [torch.bfloat16]
    for wrong in (
        (torch.device("cpu"), torch.bfloat16, 8, 2, 64),
        (card, torch.float32, 8, 2, 64),
        (card, torch.bfloat16, 8, 2, 60),
        (card, torch.bfloat16, 8, 2, 512),
    ):
        assert kernel_for(*wrong) is None
    for fault in (0.2, RuntimeError("no kernel image"), float("nan")):

        def faulty(*_: Any, fault: Any = fault) -> float:
            if isinstance(fault, Exception):
                raise fault
            return float(fault)

        monkeypatch.setattr(varlen, "disagreement", faulty)
        with pytest.warns(UserWarning, match="in groups, without torch's varlen_attn on cuda:0"):
            assert kernel_for(card, torch.bfloat16, 8, 2, 64) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel_for(card, torch.bfloat16, 8, 2, 64) is None


@pytest.mark.parametrize("case", ["plain model", "virtual tokens before", "keys before", "soft cap", "sink", "dropout"])
def test_what_the_kernel_lacks_is_for_groups(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, case: str):
    used: list[str] = []

    def kernel(*given: Any, **named: Any) -> torch.Tensor:
        used.append(case)
        return varlen.plain(*given, **named)

    monkeypatch.setattr(varlen, "kernel_for", lambda *_: kernel)
    packed = layout(1)
    if case == "plain model":
        tree = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path), attn_implementation=ATTENTION)
        put_in(tree)
        with torch.no_grad():
            ours = packed_hidden(tree, packed)
            assert used
            used.clear()
            put_in(tree, plain=True)
            assert torch.allclose(packed_hidden(tree, packed), ours, atol=1e-5)
    else:
        options: dict[str, Any] = {"soft cap": {"softcap": 5.0}, "sink": {"s_aux": torch.zeros(HEADS)}}.get(case, {})
        options |= {"dropout": 0.1} if case == "dropout" else {}
        memory = ((torch.zeros(GROUPS, 2, WIDTH), torch.zeros(GROUPS, 2, WIDTH)),)
        packed = packed.after(2) if case == "virtual tokens before" else packed
        packed = packed.remembering(2, memory) if case == "keys before" else packed
        module = torch.nn.Module()
        module.layer_idx = 0  # type: ignore[assignment]
        attend(module, *given(packed, 0, torch.float32), None, layout=packed.layout, **options)
    assert not used
    assert packing.pack([[1]]).layout.runs is not None
