"""Packed rows give what each sequence gives alone, and no sequence sees another."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from align.models.packing import ATTENTION, pack, pack_branches
from tests.tiny import save_tiny_llama


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = save_tiny_llama(tmp_path_factory.mktemp("base"))
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=ATTENTION, dtype=torch.float64).eval().model


def hidden(backbone, packed):
    out = backbone(input_ids=packed.ids_1N, position_ids=packed.positions_1N, layout=packed.layout, use_cache=False)
    return out.last_hidden_state[0]


def alone(backbone, ids):
    return backbone(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]


def sequences(count, low=1, high=23, seed=0):
    draw = random.Random(seed)
    return [[draw.randrange(5, 200) for _ in range(draw.randint(low, high))] for _ in range(count)]


def test_packed_sequences_equal_each_alone(backbone):
    rows = sequences(17)
    out = hidden(backbone, pack(rows))
    start = 0
    for row in rows:
        assert torch.allclose(out[start : start + len(row)], alone(backbone, row), atol=1e-12)
        start += len(row)


def test_branches_share_their_prefix_and_do_not_see_each_other(backbone):
    prefixes = sequences(5, seed=1)
    families = [(a, b) for a, b in zip(sequences(5, seed=2), sequences(5, seed=3), strict=True)]
    packed = pack_branches(prefixes, families)
    assert packed.tokens == sum(map(len, prefixes)) + sum(len(a) + len(b) for a, b in families)
    out = hidden(backbone, packed)
    start = 0
    for prefix, family in zip(prefixes, families, strict=True):
        assert torch.allclose(out[start : start + len(prefix)], alone(backbone, prefix), atol=1e-12)
        start += len(prefix)
        for branch in family:
            expected = alone(backbone, [*prefix, *branch])[len(prefix) :]
            assert torch.allclose(out[start : start + len(branch)], expected, atol=1e-12)
            start += len(branch)


def test_changing_one_sequence_changes_nothing_in_its_neighbours(backbone):
    rows = sequences(6, low=4)
    before = hidden(backbone, pack(rows))
    changed = [list(row) for row in rows]
    changed[2] = [7] * len(rows[2])
    after = hidden(backbone, pack(changed))
    first = sum(map(len, rows[:2]))
    last = first + len(rows[2])
    assert torch.equal(before[:first], after[:first]) and torch.equal(before[last:], after[last:])
    assert not torch.allclose(before[first:last], after[first:last])


def test_gradients_of_a_pack_are_the_sum_of_the_gradients_alone(backbone):
    rows = sequences(4, seed=5)
    weight = backbone.layers[0].self_attn.q_proj.weight
    (together,) = torch.autograd.grad(hidden(backbone, pack(rows)).square().sum(), weight)
    apart = sum(torch.autograd.grad(alone(backbone, row).square().sum(), weight)[0] for row in rows)
    assert torch.allclose(together, apart, atol=1e-10)


def test_sliding_window_limits_what_long_rows_see():
    from align.models.packing import attend

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    layout = pack([[1] * 9]).layout
    out, _ = attend(torch.nn.Identity(), q, k, v, None, layout=layout, sliding_window=3)
    index = torch.arange(9)
    band = (index[:, None] >= index[None]) & (index[:, None] - index[None] < 3)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, band).transpose(1, 2)
    assert torch.allclose(out, expected, atol=1e-12)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("extra", [{}, {"softcap": 2.0}, {"s_aux": [0.3, -1.0, 0.5, 2.0, 0.0, 1.0]}])
def test_one_more_token_reads_shared_heads_as_repeated_ones(window, extra):
    """Six query heads over two key-value heads, masked columns, a window, a cap, sinks; float64, by hand."""
    from align.models.packing import attend

    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(*size, generator=generator, dtype=torch.float64)
        for size in ((3, 6, 1, 5), (3, 2, 9, 5), (3, 2, 9, 5))
    )
    visible = torch.arange(9)[None] >= torch.tensor([0, 4, 7])[:, None]
    given = {name: torch.tensor(x, dtype=torch.float64) if name == "s_aux" else x for name, x in extra.items()}
    out, _ = attend(torch.nn.Identity(), q, k, v, visible[:, None, None], 0.7, sliding_window=window, **given)
    for row in range(3):
        for head in range(6):
            scores = k[row, head // 3] @ q[row, head, 0] * 0.7
            if "softcap" in given:
                scores = torch.tanh(scores / 2.0) * 2.0
            seen = visible[row] & (torch.arange(9) >= (5 if window else 0))
            weights = scores.exp() * seen
            total = weights.sum() + (given["s_aux"][head].exp() if "s_aux" in given else 0.0)
            assert torch.allclose(out[row, 0, head], (weights / total) @ v[row, head // 3], atol=1e-6)
