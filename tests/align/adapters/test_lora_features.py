"""`lora_features`: its equation and gradients in float64, and whose features a token is computed with."""

from __future__ import annotations

import pytest
import torch

from align.adapters.layers.lora_features import Film
from align.adapters.layers.lora_offset import lora_layers
from align.adapters.lora_features import LoraFeatures
from align.config.schema import Load
from align.inference.generation import RolloutEngine, Sampling
from align.models.low_rank import stack
from align.models.packing import pack, pack_branches
from align.models.row_features import reader_of
from align.roles import Role
from data_prep.core.errors import UserError
from data_prep.types import FeaturedIds, features_of, joined
from tests.tiny_chain import base, bases, fresh, logits, read, sentences

STYLES = ["plain", "cheerful", "pirate"]


def role(**options) -> Role:
    return fresh("lora_features", Load.fp32, **options)


def styled(features=STYLES) -> list[list[int]]:
    return [FeaturedIds(ids, one) for ids, one in zip(sentences(len(features)), features, strict=True)]


def test_the_equation_and_its_gradients_in_float64():
    """W x + s B ((1 + G f) * A x + H f) for two rows of other features in one packed batch, against the plain form."""
    found = role(numbers=2, shift=True, rank=3).carrier.double()
    layer = next(iter(lora_layers(found).values()))
    parts = [layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.film.scale, layer.film.shift]
    rows = [FeaturedIds([1, 2, 3], (0.5, -1.25)), FeaturedIds([4, 5], (2.0, 0.75))]
    x = torch.randn(1, 5, layer.in_features, dtype=torch.float64, requires_grad=True)
    reader_of(found.get_base_model()).enter(pack(rows).features)
    out = layer(x)
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), [x, *parts])

    down, up, scale, shift = parts
    f = torch.tensor([[0.5, -1.25]] * 3 + [[2.0, 0.75]] * 2, dtype=torch.float64)
    inner = (1 + f @ scale.T) * (x[0] @ down.T) + f @ shift.T
    plain = layer.base_layer(x) + layer.scaling["default"] * (inner @ up.T)
    theirs = torch.autograd.grad((plain * weight).sum(), [x, *parts])
    torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)
    for own, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("zero", [None, (0.0, 0.0)])
def test_zero_features_are_lora_to_the_same_bits(zero):
    ours, plain = role(numbers=2, shift=True), fresh("lora", Load.fp32)
    theirs = lora_layers(plain.carrier)
    with torch.no_grad():
        for name, layer in lora_layers(ours.carrier).items():
            layer.lora_A["default"].weight.copy_(theirs[name].lora_A["default"].weight)
            layer.lora_B["default"].weight.copy_(theirs[name].lora_B["default"].weight)
    rows = [list(ids) if zero is None else FeaturedIds(ids, zero) for ids in sentences()]
    assert torch.equal(logits(ours, rows), logits(plain, rows))
    assert not torch.equal(logits(ours, [FeaturedIds(ids, (1.0, 0.0)) for ids in rows]), logits(plain, rows))


def test_rows_of_a_batch_are_those_of_their_own():
    """Packed, and as branches of one prompt; without features beside rows that have some."""
    found = role(categories=STYLES)
    rows = [*styled(), list(sentences(1)[0])]
    torch.testing.assert_close(
        logits(found, rows), torch.cat([logits(found, [row]) for row in rows]), rtol=0, atol=1e-5
    )
    same = [logits(found, [FeaturedIds(list(rows[0]), one)]) for one in STYLES]
    assert not torch.allclose(same[0], same[1], atol=1e-3) and not torch.allclose(same[1], same[2], atol=1e-3)
    branches = [[[7, 8], [9]], [[10], [11, 12]], [[13], [14]]]
    with torch.no_grad():
        together = found.hidden(pack_branches(rows[:3], branches))
    place = 0
    for prompt, family in zip(rows[:3], branches, strict=True):
        start = place = place + len(prompt)
        for branch in family:
            alone = found.hidden(pack([joined(prompt, branch)]))[len(prompt) :].detach()
            torch.testing.assert_close(together[start : start + len(branch)], alone, rtol=0, atol=1e-5)
            start += len(branch)
        place = start


def test_replies_are_sampled_by_the_features_of_their_prompts():
    """Also once rows have ended and were dropped from the batch."""
    found = role(categories=STYLES)
    prompts = [FeaturedIds(ids, STYLES[place % 3]) for place, ids in enumerate(sentences(6))]
    replies = RolloutEngine(found, 200).generate(prompts, Sampling(12, greedy=True))
    alone = [RolloutEngine(found, 200).generate([one], Sampling(12, greedy=True))[0] for one in prompts]
    assert [one.ids for one in replies] == [one.ids for one in alone]


def test_what_is_computed_again_in_backward_has_the_features_of_its_pass():
    """Two passes of other features before the first backward."""
    found = role(categories=STYLES).train()

    def gradients() -> list[torch.Tensor]:
        found.zero_grad(set_to_none=True)
        first, second = (found.hidden(pack([row])) for row in styled()[1:])
        first.square().sum().backward()
        second.sum().backward()
        return [p.grad for p in found.parameters() if p.requires_grad]

    kept = gradients()
    found.tree.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for again, was in zip(gradients(), kept, strict=True):
        torch.testing.assert_close(again, was, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("options", "features"), [({"categories": STYLES}, "pirate"), ({"numbers": 2}, (0.5, -2.0))])
def test_fixed_features_are_a_plain_lora(options, features, tmp_path):
    trained = role(**options)
    trained.adapter.save(trained.carrier, tmp_path)
    found = bases()
    fixed = LoraFeatures(**options, fixed=features if isinstance(features, str) else list(features))
    assert fixed.traits.low_rank and fixed.traits.mergeable and not trained.adapter.traits.low_rank
    carrier = fixed.load(found.root(Load.fp32).tree(), tmp_path, trainable=False)
    wanted = logits(trained, [FeaturedIds(ids, features) for ids in sentences()])
    rows = [list(ids) for ids in sentences()]
    torch.testing.assert_close(logits(Role("fixed", carrier, fixed), rows), wanted, rtol=0, atol=1e-6)
    tree = found.root(Load.fp32).tree()
    stack(tree, fixed.low_rank_terms(carrier))
    torch.testing.assert_close(logits(Role("stacked", tree, None), rows), wanted, rtol=0, atol=1e-5)
    private = fixed.load(found.root(Load.fp32).private(), tmp_path, trainable=False)
    merged = Role("merged", fixed.merge(private), None)
    assert reader_of(merged.tree) is None and "feature_reader.table" not in merged.tree.state_dict()
    torch.testing.assert_close(logits(merged, rows), wanted, rtol=0, atol=1e-5)
    assert not LoraFeatures(numbers=2, shift=True, fixed=[1.0, 1.0]).traits.low_rank


def test_the_shift_starts_at_zero_and_the_scale_does_not():
    film = Film(4, 3, shift=True)
    assert not film.shift.any() and film.scale.all()


@pytest.mark.parametrize(
    ("options", "features", "expected"),
    [
        ({"categories": STYLES}, "pirat", "got pirat; expected plain, cheerful, pirate; did you mean 'pirate'"),
        ({"categories": STYLES}, (1.0,), "got numbers; expected plain"),
        ({"categories": STYLES}, None, "got none; expected plain"),
        ({"numbers": 2}, (1.0,), "got 1 numbers; expected 2"),
        ({"numbers": 2}, (1.0, float("nan")), "some of them not finite; expected 2"),
        ({"numbers": 2}, "plain", "got plain; expected 2 numbers"),
        ({"numbers": 2}, None, "got none; expected 2 numbers"),
    ],
)
def test_wrong_features_are_named(options, features, expected):
    assert expected in (LoraFeatures(**options).against_features(features) or "")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"categories": STYLES, "numbers": 3}, "adapter.numbers"),
        ({"categories": ["plain", "plain"]}, "adapter.categories"),
        ({"categories": ["plain", " "]}, "adapter.categories"),
        ({"categories": STYLES, "fixed": "happy"}, "adapter.fixed"),
        ({"dora": True}, "adapter.dora"),
        ({"trainable_tokens": ["<x>"]}, "adapter.trainable_tokens"),
    ],
)
def test_what_does_not_go_together_is_refused(options, field):
    (problem,) = LoraFeatures(**options).check(read(base() / "config.json"))
    assert problem.field == field


def test_a_layer_that_sees_some_of_the_tokens_is_refused():
    found = role(categories=STYLES)
    layer = next(iter(lora_layers(found.carrier).values()))
    reader_of(found.tree).enter(pack(styled()).features)
    with pytest.raises(UserError, match="sees 2 of the tokens"):
        layer(torch.randn(1, 2, layer.in_features))


def test_ids_carry_features_through_parts_and_processes():
    import pickle

    row = FeaturedIds([1, 2, 3], "plain")
    assert features_of(row[:2]) == features_of(pickle.loads(pickle.dumps(row))) == "plain"
    assert row[:2] == [1, 2] and row[1] == 2 and features_of(joined(row, [4])) == "plain"
    assert features_of(joined([1], row)) is None
