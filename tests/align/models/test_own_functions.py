"""Functions with gradients written by hand: values, gradients and what is kept, beside the plain forms, in float64."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from align.models import own_functions as own


def drawn(*sizes: tuple[int, ...], grad: bool = True) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes]
    return [tensor.requires_grad_(grad) for tensor in found]


def plain_low_rank(out, x, down, up):
    return out + (x @ down.T @ up.T) * 0.7


def own_low_rank(out, x, down, up):
    return own.add_low_rank(out * 1.0, x, down, up, 0.7)  # a fresh result, as of a linear layer


def plain_norm(x, weight):
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5))


def plain_head(hidden, weight, bias, targets, scale):
    return -F.cross_entropy(F.linear(hidden, weight, bias) * scale, targets, reduction="none")


CASES = {
    "low rank": (own_low_rank, plain_low_rank, ((2, 3, 5), (2, 3, 4), (2, 4), (5, 2))),
    "norm": (lambda x, w: own.normalised(x, w, 1e-5), plain_norm, ((2, 3, 6), (6,))),
    "gated": (own.gated, lambda gate, up: F.silu(gate) * up, ((3, 5), (3, 5))),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_plain_form(name):
    ours, plain, sizes = CASES[name]
    given = drawn(*sizes)
    one, two = ours(*given), plain(*given)
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    weight = torch.linspace(-1, 1, one.numel(), dtype=torch.float64).view_as(one)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), given) for x in (one, two)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert gradcheck(ours, given)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_without_gradients_no_function_is_made_and_the_bits_are_the_same(name, narrow, monkeypatch):
    """Sampling makes millions of such calls of one token each."""
    ours, _, sizes = CASES[name]
    given = [tensor.float().detach().requires_grad_() for tensor in drawn(*sizes)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
        whole = ours(*given)
        monkeypatch.setattr(torch.autograd.Function, "apply", None)
        with torch.no_grad():
            alone = ours(*given)
    assert torch.equal(alone, whole) and alone.dtype == whole.dtype


@pytest.mark.parametrize("name", CASES)
def test_each_input_may_be_frozen(name):
    ours, plain, sizes = CASES[name]
    for only in range(len(sizes)):
        given = drawn(*sizes, grad=False)
        given[only].requires_grad_()
        one, two = (torch.autograd.grad(way(*given).square().sum(), given[only])[0] for way in (ours, plain))
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [2, 256])
@pytest.mark.parametrize("scale", [1.0, 1.6])
def test_the_head_makes_its_gradient_in_the_forward(rows, scale, monkeypatch):
    monkeypatch.setattr(own, "HEAD_ROWS", rows)
    hidden, weight, bias = drawn((5, 4), (7, 4), (7,))
    targets = torch.tensor([0, 6, 3, 3, 1])
    whole = own.head_logprobs(hidden, weight, bias, targets, scale)
    assert gradcheck(lambda *given: own.head_logprobs(*given, targets, scale), [hidden, weight, bias])
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    one = own.head_logprobs(hidden, weight, bias, targets, scale)
    two = plain_head(hidden, weight, bias, targets, scale)
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    kept = one.grad_fn.saved_tensors
    assert [tensor.shape for tensor in kept] == [hidden.shape]
    with torch.no_grad():
        still = own.head_logprobs(hidden, weight, bias, targets, scale)
        beside, entropy_M = own.head_statistics(hidden, weight, bias, targets, scale)
    assert torch.equal(one, whole) and torch.equal(still, whole) and torch.equal(beside, whole), "the same bits"
    chances = torch.distributions.Categorical(logits=F.linear(hidden, weight, bias) * scale)
    torch.testing.assert_close(entropy_M, chances.entropy().detach(), rtol=1e-12, atol=1e-12)


def test_a_trained_head_learns_under_autocast():
    hidden, weight, bias = (tensor.float().detach().requires_grad_() for tensor in drawn((5, 4), (7, 4), (7,)))
    targets = torch.tensor([0, 6, 3, 3, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = own.head_logprobs(hidden.to(torch.bfloat16), weight, bias, targets)
    plain = plain_head(hidden, weight, bias, targets, 1.0)
    for one, two in zip(*(torch.autograd.grad(x.sum(), [weight, bias]) for x in (found, plain)), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, two, rtol=5e-2, atol=5e-2)  # eight bits of the hidden states


def test_what_is_kept_for_backward():
    """LoRA keeps its input only where A is trained; norm and SwiGLU keep their inputs and one number a token."""
    out, x, down, up = drawn((6, 5), (6, 4), (2, 4), (5, 2))
    trained = own.add_low_rank(out * 1.0, x, down, up, 0.5).grad_fn.saved_tensors
    frozen = own.add_low_rank(out * 1.0, x, down.detach(), up, 0.5).grad_fn.saved_tensors
    assert trained[0] is not None and frozen[0] is None
    x, weight = drawn((6, 5), (5,))
    assert sum(t.numel() for t in own.normalised(x, weight, 1e-6).grad_fn.saved_tensors) == 30 + 5 + 6


@pytest.mark.parametrize("autocast", [False, True])
def test_types_are_those_of_the_plain_forms(autocast):
    """A bfloat16 base, or autocast over a float32 one, with a float32 adapter."""
    kind = torch.float32 if autocast else torch.bfloat16
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).to(kind).requires_grad_()
    weight = torch.ones(5, 4, dtype=kind)
    down, up = (tensor.float().detach().requires_grad_() for tensor in drawn((2, 4), (5, 2)))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        base = F.linear(x, weight)
        plain = base + (F.linear(F.linear(x.to(torch.float32), down), up) * 0.5).to(base.dtype)
        ours = own.add_low_rank(F.linear(x, weight), x, down, up, 0.5)
        assert own.normalised(x, weight[0], 1e-6).dtype == x.dtype
    assert ours.dtype == base.dtype == torch.bfloat16
    torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2)
    for a, b in zip(*(torch.autograd.grad(y.float().sum(), (x, down, up)) for y in (ours, plain)), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2)


def test_a_factor_is_made_narrow_once_until_it_changes():
    factors = [torch.nn.Parameter(torch.randn(3, 5)), torch.randn(4, 3)]
    x, copies = torch.randn(7, 5).bfloat16(), own.NarrowCopies()

    def term():
        return own.add_low_rank(torch.zeros(7, 4, dtype=torch.bfloat16), x, *factors, 0.5)

    with torch.no_grad():
        plain = term()
        with copies:
            assert torch.equal(term(), plain) and torch.equal(term(), plain)
            assert copies.of(factors[0], torch.bfloat16) is copies.of(factors[0], torch.bfloat16)
            factors[0].mul_(3)
            changed = term()
        assert not torch.equal(changed, plain) and torch.equal(changed, term())
    with copies:
        assert term().requires_grad, "what learns is made narrow every time"
    assert len(copies._held) == 2
    factors.clear()
    gc.collect()
    assert not copies._held, "a factor that is no more is let go"
