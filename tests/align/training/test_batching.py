"""How steps are cut into forward passes: nothing lost, the budget kept, the largest first, alike on any processes."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.training.batching import Windows, batches, best_fit, in_order, shared
from align.training.loop import _held_out, fit
from align.training.objectives import LanguageModeling, Pairwise
from data_prep.prepare.arrow_rows import lengths_of
from data_prep.types import PairTokens, PromptTokens
from tests.tiny_training import lora, options, pair_rows, token_rows, updater

LENGTHS = st.lists(st.integers(1, 40), max_size=40)
LIMITS = st.integers(0, 5)


def sums(lengths, passes):
    return [sum(lengths[place] for place in one) for one in passes]


def test_best_fit_by_hand():
    """20 is over the budget; 7 does not fit beside 9, 3 fits beside 7 alone, 1 beside 9 alone."""
    assert best_fit([7, 1, 20, 3, 9], 0, 10) == [[2], [4, 1], [0, 3]]
    assert best_fit([5, 5, 5, 5, 4], 0, 15) == [[0, 1, 2], [3, 4]]
    assert best_fit([5, 5, 5, 5, 4], 2, 15) == [[0, 1], [2, 3], [4]]
    assert best_fit([], 0, 10) == []


@given(LENGTHS, LIMITS, st.integers(1, 60))
def test_best_fit_keeps_its_limits(lengths, rows, tokens):
    passes = best_fit(lengths, rows, tokens)
    assert sorted(place for one in passes for place in one) == list(range(len(lengths)))
    filled = sums(lengths, passes)
    assert filled == sorted(filled, reverse=True)
    for one, used in zip(passes, filled, strict=True):
        assert used <= tokens or len(one) == 1
        assert not rows or len(one) <= rows
    if not rows:  # two passes that fit into one would have been one
        assert len(filled) < 2 or filled[-2] + filled[-1] > tokens


@given(LENGTHS, LIMITS, st.integers(0, 60))
def test_in_order_keeps_its_limits(lengths, rows, tokens):
    passes = in_order(lengths, rows, tokens)
    assert [place for one in passes for place in one] == list(range(len(lengths)))
    for one, used in zip(passes, sums(lengths, passes), strict=True):
        assert not tokens or used <= tokens or len(one) == 1
        assert not rows or len(one) <= rows
    if not rows and not tokens:
        assert len(passes) <= 1


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 5))
def test_shares_are_even(lengths, processes):
    shares = shared(np.array(lengths), processes)
    assert sorted(place for share in shares for place in share) == list(range(len(lengths)))
    loads = sums(lengths, shares)
    assert max(loads) - min(loads) <= max(lengths)
    assert len(lengths) < processes or all(shares)


@pytest.mark.parametrize("budget", [30, 64, 200])
def test_the_largest_pass_is_the_first_of_all(budget):
    lengths = np.random.default_rng(7).integers(3, 50, 203)
    plans = {}
    for processes in (1, 2, 3):
        chosen = options(batch_size=20, micro_tokens=budget)
        windows = Windows(lengths, chosen, 5, processes)
        for epoch in (0, 1):
            plan = plans[processes, epoch] = list(windows.epoch(epoch, 0, windows.begins_with()))
            assert [w.passes for w in plan] == [w.passes for w in windows.epoch(epoch, 0, windows.begins_with())]
            rows = [sorted(row for own in w.passes for one in own for row in one) for w in plan]
            assert sorted(row for step in rows for row in step) == list(range(203))
            assert rows == [sorted(row for own in w.passes for one in own for row in one) for w in plans[1, epoch]], (
                "the same windows in the same order on any number of processes"
            )
            assert [w.tokens for w in plan] == [int(lengths[r].sum()) for r in rows]
    sizes = [[int(lengths[one].sum()) for one in w.passes[0]] for w in plans[1, 0]]
    assert sizes[0][0] == max(max(own) for own in sizes) and all(own[0] == max(own) for own in sizes)


def test_without_a_budget_the_order_is_that_of_the_batches():
    windows = Windows(np.ones(50, dtype=np.int64), options(batch_size=8, micro_batch_size=3), 1, 2)
    for window, index in zip(windows.epoch(0, 0, 0), batches(50, 8, 1, 0), strict=True):
        assert [list(chain(*own)) for own in window.passes] == [index[0::2].tolist(), index[1::2].tolist()]
        assert all(len(one) <= 3 for own in window.passes for one in own)


@pytest.mark.parametrize("kind", ["tokens", "pairs"])
def test_training_packs_within_its_budget_and_says_so(kind):
    """Measured on the packed batches themselves: a pair's prompt counts once."""
    parent = LanguageModeling if kind == "tokens" else Pairwise

    class Watched(parent):  # type: ignore[misc, valid-type]
        def collate(self, rows):
            batch = super().collate(rows)
            seen.append((batch.packed.tokens, list(batch.ids)))
            return batch

    seen: list[tuple[int, list[str]]] = []
    rows = token_rows() if kind == "tokens" else pair_rows()
    budget = max(lengths_of(rows).tolist()) + 15
    logged = []
    chosen = options(batch_size=8, micro_tokens=budget, max_steps=4)
    objective = Watched(lora(head=kind == "pairs", rank=1))
    fit(updater(objective, chosen, 4), rows, [], 0, lambda step, split, numbers: logged.append(numbers))
    assert all(tokens <= budget for tokens, _ in seen) and seen[0][0] == max(
        tokens for tokens, _ in seen[: len(seen) // 2]
    )
    assert sum(numbers["micro_batches"] for numbers in logged) == len(seen) < 32
    assert (
        sum(numbers["tokens"] for numbers in logged) == sum(tokens for tokens, _ in seen) == 2 * lengths_of(rows).sum()
    )


def test_evaluation_keeps_the_budget_too():
    objective, rows = LanguageModeling(lora(rank=1)), token_rows()
    whole = _held_out(updater(objective, options(), 1), rows).evaluate()
    packed = _held_out(updater(objective, options(micro_tokens=40), 1), rows)
    ((passes, _),) = packed.parts.values()
    assert len(passes) > 1 and all(batch.packed.tokens <= 40 for batch in passes)
    assert packed.evaluate() == pytest.approx(whole, rel=1e-5)


def test_lengths_are_of_all_sequences_of_a_row():
    assert lengths_of([PairTokens([1, 2], [3], [4, 5], "p")]).tolist() == [5]
    assert lengths_of([PromptTokens([1, 2, 3], "t", "p")]).tolist() == [3] and lengths_of([]).tolist() == []
