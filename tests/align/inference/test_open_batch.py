"""Rows that come and go between tokens: each says what it says alone, whoever stands beside it."""

from __future__ import annotations

import math

import pytest
import torch

from align.config.registries import adapters
from align.config.schema import Load
from align.inference import generation
from align.inference.generation import RolloutEngine, Sampling, streams_of
from align.inference.mixed_batch import Mixed
from align.inference.open_batch import OpenBatch, Row, RowSampling
from align.models.packing import pack
from align.roles import Role
from data_prep.core.errors import TrainingStopped
from tests.tiny_chain import bases, fresh, sentences

GREEDY = RowSampling(8, frozenset(), temperature=0)


def mixed_of(*methods: str) -> tuple[Mixed, dict[str | None, Role]]:
    """Adapters over the tiny base, and each as a role of its own; None is the base."""
    found = bases()
    roles: dict[str | None, Role] = {
        name: fresh(name, Load.fp32, found, seed=i).freeze() for i, name in enumerate(methods)
    }
    low = [name for name in methods if adapters.get(name).traits.low_rank]
    terms = {name: [roles[name].adapter.low_rank_terms(roles[name].carrier)] for name in low}
    apart = {name: roles[name] for name in methods if name not in low}
    roles[None] = Role("base", found.root(Load.fp32).tree(), None).freeze()
    return Mixed.over(found.root(Load.fp32), terms, apart), roles


def row(prompt, adapter=None, sampling=GREEDY, seed=0):
    return Row(prompt, sampling, streams_of(1, torch.Generator().manual_seed(seed))[0], adapter)


def finish(batch, rows):
    while not all(each.over for each in rows):
        batch.step()
    assert batch.rows == []


@pytest.mark.parametrize("names", [("lora", None, "vera"), ("prefix",), ("prompt",)], ids=str)
def test_rows_that_come_late_and_leave_early_change_no_others(names):
    """Prompts of unequal length join at different tokens; one row ends early, one reader leaves."""
    mixed, roles = mixed_of(*filter(None, names))
    batch = OpenBatch.of(mixed, names[0])
    rows = [row(ids, names[i % len(names)]) for i, ids in enumerate(sentences(7, seed=3))]
    alone = [RolloutEngine(roles[each.adapter], -1).generate([each.prompt], Sampling(8, greedy=True)) for each in rows]
    rows[1].sampling = RowSampling(3, frozenset(), temperature=0)
    batch.admit(rows[:2])
    batch.step()
    batch.step()
    batch.admit(rows[2:5])
    rows[3].left = True
    batch.step()
    assert rows[3] not in batch.rows and len(batch.rows) == 3
    batch.admit(rows[5:])
    finish(batch, [each for each in rows if each is not rows[3]])
    for each, (expected,) in zip(rows, alone, strict=True):
        assert each.reply.ids == expected.ids[: len(each.reply.ids)]
    assert [len(each.reply.ids) for each in rows] == [8, 3, 8, 2, 8, 8, 8]


def test_a_prompt_is_read_once_for_the_rows_of_each_adapter(monkeypatch):
    mixed, read = mixed_of("lora")[0], []
    batch, prompt = OpenBatch.of(mixed, "lora"), sentences(1)[0]
    monkeypatch.setattr(generation, "pack", lambda rows: read.append(rows) or pack(rows))
    batch.admit([row(prompt, adapter) for adapter in ("lora", None, "lora")])
    assert read == [[prompt, prompt]]


def test_a_row_that_leaves_frees_its_columns():
    mixed, _ = mixed_of("lora")
    batch = OpenBatch.of(mixed, None)
    long, short = row(sentences(1, seed=1)[0] * 20), row([5, 6])
    batch.admit([long, short])
    assert batch._cache.layers[0].keys.shape[::2] == (2, 60)
    long.left = True
    batch.step()
    assert batch._cache.layers[0].keys.shape[::2] == (1, 3)


def test_a_seed_draws_what_the_rollout_engine_draws():
    mixed, roles = mixed_of("lora")
    sampling = RowSampling(10, frozenset(), temperature=0.7)
    batch = OpenBatch.of(mixed, "lora")
    rows = [row(ids, "lora", sampling, seed=5) for ids in sentences(2)]
    batch.admit([*rows, row([7, 8], "lora", GREEDY), row([9], None, RowSampling(10, frozenset(), top_p=0.5))])
    finish(batch, rows + batch.rows)
    for each in rows:
        generator = torch.Generator().manual_seed(5)
        expected = RolloutEngine(roles["lora"], -1).generate([each.prompt], Sampling(10, 0.7), generator)
        assert each.reply.ids == expected[0].ids


def test_an_end_token_ends_a_row_and_stands_in_its_reply():
    mixed, roles = mixed_of("lora")
    (whole,) = RolloutEngine(roles[None], -1).generate([[5, 6, 7]], Sampling(8, greedy=True))
    end = whole.ids[2]
    batch, one = OpenBatch.of(mixed, None), row([5, 6, 7], None, RowSampling(8, frozenset({end, 4}), temperature=0))
    batch.admit([one])
    finish(batch, [one])
    assert one.reply.finished and one.reply.ids == whole.ids[: whole.ids.index(end) + 1]


def fixed(probabilities):
    """A batch whose model always gives these probabilities."""
    batch = OpenBatch(Role("base", bases().root(Load.fp32).tree(), None).freeze())
    logits_V = torch.tensor(probabilities).log()
    batch.role.logits = lambda hidden_MD: logits_V.expand(hidden_MD.shape[0], -1)
    return batch


@pytest.mark.parametrize(
    ("top_p", "seen"), [(1e-60, {1}), (0.3, {1}), (0.5, {1}), (0.6, {1, 3}), (0.85, {0, 1, 3}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_draws_from_the_likeliest_that_reach_it(top_p, seen):
    batch = fixed([0.2, 0.5, 0.05, 0.25])
    rows = [row([5], None, RowSampling(1, frozenset(), top_p=top_p), seed) for seed in range(300)]
    batch.admit(rows)
    assert {each.reply.ids[0] for each in rows} == seen


def test_logprobs_are_those_of_the_model_at_temperature_one():
    batch = fixed([0.2, 0.5, 0.05, 0.25])
    rows = [row([5], None, RowSampling(1, frozenset(), temperature=0, logprobs=k)) for k in (2, 0, None)]
    batch.admit(rows)
    assert [each.reply.logprobs for each in rows] == [[pytest.approx(math.log(0.5))]] * 2 + [[]]
    assert [token for token, _ in rows[0].likeliest[0]] == [1, 3] and rows[1].likeliest == [[]]
    assert rows[0].likeliest[0][1][1] == pytest.approx(math.log(0.25))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_end_a_row_with_its_reason(temperature):
    batch = fixed([math.nan, 1.0])
    one = row([5], None, RowSampling(4, frozenset(), temperature=temperature))
    batch.admit([one])
    assert one.over and isinstance(one.problem, TrainingStopped) and batch.rows == []
