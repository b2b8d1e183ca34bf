"""Batches whose rows use different adapters: one forward says what each adapter's own forward says."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from align.config.registries import adapters
from align.config.schema import Load
from align.inference.generation import RolloutEngine, Sampling
from align.inference.mixed_batch import Mixed
from align.models.low_rank import LowRankTerms
from align.roles import Role
from align.training.objectives import LanguageModeling
from align.training.saving import outputs
from data_prep.core.errors import UserError
from tests.tiny_chain import bases, fresh, legal_loads, made, sentences
from tests.tiny_training import token_rows

LOADS = [Load.fp32, Load.nf4]


@cache
def cast(load: Load) -> tuple[Mixed, dict[str | None, Role]]:
    """Every method that the precision allows, mixed, and each as a role of its own; None is the base."""
    found = bases()
    names = [name for name, cls in adapters.items() if load in legal_loads(cls)]
    roles: dict[str | None, Role] = {name: fresh(name, load, found, seed=i) for i, name in enumerate(names)}
    terms = {
        name: [role.adapter.low_rank_terms(role.carrier)]
        for name, role in roles.items()
        if role.adapter.traits.low_rank
    }
    apart = {name: role.freeze() for name, role in roles.items() if name not in terms}
    for role in roles.values():
        role.freeze()
    roles[None] = Role("base", found.root(load).tree(), None).freeze()
    return Mixed.over(found.root(load), terms, apart), roles


@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.value)
def test_one_forward_equals_one_for_each_adapter(load):
    mixed, roles = cast(load)
    assert len(mixed.names) > 4 and len(mixed.apart) > 2
    names = [*roles, *roles][::-1]
    rows = list(zip(names, sentences(len(names)), strict=True))
    found = mixed.logprobs(rows)
    for (name, ids), own in zip(rows, found, strict=True):
        expected = torch.tensor(outputs(roles[name], [ids])[0])
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-5)
    different = {round(float(own.sum()), 4) for own in mixed.logprobs([(name, sentences()[0]) for name in roles])}
    assert len(different) == len(roles), "every adapter says something of its own"


def test_the_base_is_computed_once_for_all_of_them(monkeypatch):
    mixed, _ = cast(Load.fp32)
    calls = []
    mixed.role.tree.model.register_forward_hook(lambda *_: calls.append(1))
    mixed.logprobs([(name, ids) for name, ids in zip(sorted(mixed.names), sentences(20), strict=False)])
    assert len(calls) == 1
    tensors = [p.data_ptr() for p in mixed.role.tree.parameters()]
    assert tensors == [p.data_ptr() for p in cast(Load.fp32)[1][None].tree.parameters()]


def test_a_row_hears_nothing_of_its_neighbours():
    mixed, _ = cast(Load.fp32)
    first, *rest = sentences(5)
    alone = mixed.logprobs([("lora", first), *(("vera", ids) for ids in rest)])[0]
    among = mixed.logprobs([("lora", first), *((None, ids[::-1]) for ids in rest)])[0]
    assert torch.equal(alone, among)


@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.value)
def test_replies_are_those_of_each_adapter_alone(load):
    mixed, roles = cast(load)
    names = [*roles, *roles] if load is Load.fp32 else ["lora", None, "vera", "lora", "prefix"]
    prompts = sentences(len(names), seed=3)
    prompts[names.index("vera")] = prompts[names.index("lora")]  # one prompt of two adapters is read by both
    rows = list(zip(names, prompts, strict=True))
    sampling = Sampling(8, greedy=True)
    alone = [RolloutEngine(roles[name], -1).generate([ids], sampling)[0] for name, ids in rows]
    by_end: dict[int, int] = {}
    for reply in alone:
        by_end[reply.ids[2]] = by_end.get(reply.ids[2], 0) + 1
    end = max(by_end, key=by_end.__getitem__)  # ends many rows early, so that the batch shrinks
    alone = [RolloutEngine(roles[name], end).generate([ids], sampling)[0] for name, ids in rows]
    assert len({len(reply.ids) for reply in alone}) > 1
    for found, expected in zip(mixed.respond(rows, sampling, end), alone, strict=True):
        assert (found.ids, found.finished) == (expected.ids, expected.finished)
        torch.testing.assert_close(torch.tensor(found.logprobs), torch.tensor(expected.logprobs), rtol=0, atol=1e-5)


def test_losses_are_those_of_the_objective():
    mixed, roles = cast(Load.fp32)
    rows = token_rows(18)
    names = ["lora", "prefix", None]
    found = mixed.losses([(names[i % 3], row) for i, row in enumerate(rows)], chunk=5)
    for place, name in enumerate(names):
        objective = LanguageModeling(roles[name]).eval()
        batch = objective.collate(rows[place::3])
        with torch.no_grad():
            assert found[name] == pytest.approx(float(objective(batch)[0]) / batch.weight, rel=1e-5)


def test_a_layer_that_one_adapter_leaves_out_is_the_base_there():
    found = bases()
    few = fresh("lora", Load.fp32, found, target_modules=["q_proj"])
    many = fresh("lora", Load.fp32, found, seed=4)
    terms: dict[str, list[LowRankTerms]] = {
        name: [role.adapter.low_rank_terms(role.carrier)] for name, role in (("few", few), ("many", many))
    }
    mixed = Mixed.over(found.root(Load.fp32), terms)
    ids = sentences()[2]
    for name, role in (("few", few), ("many", many)):
        torch.testing.assert_close(
            mixed.logprobs([("few", ids), ("many", ids)])[["few", "many"].index(name)],
            torch.tensor(outputs(role.freeze(), [ids])[0]),
            rtol=0,
            atol=1e-5,
        )


def test_an_unknown_adapter_is_named():
    mixed, _ = cast(Load.fp32)
    with pytest.raises(UserError, match=r"unknown adapter 'lorra'.*did you mean 'lora'"):
        mixed.logprobs([("lorra", [5, 6])])


def test_checkpoints_are_opened_by_name(tmp_path):
    run = made("sft", "adapter=lora", "stages.sft.lr=1e-2", "name=a", out=tmp_path)
    other = made("sft", "adapter=bottleneck", "stages.sft.lr=1e-2", "name=b", out=tmp_path)
    mixed = Mixed.open({"one": "a", "two": f"{other}/sft"}, out=str(tmp_path))
    assert mixed.names == {"one"} and set(mixed.apart) == {"two"}
    from align.checkpoints.checkpoint import Checkpoint

    for name, folder in (("one", run), ("two", other)):
        saved = Checkpoint.open(folder / "sft")
        (ids, *_), (expected, *_) = (saved.record["probe"][key] for key in ("input_ids", "expected"))
        torch.testing.assert_close(
            mixed.logprobs([(name, ids), (None, ids)])[0], torch.tensor(expected), atol=1e-5, rtol=0
        )
