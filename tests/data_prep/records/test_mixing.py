"""Mixtures: what is drawn of each source, in which order, on which side, and what the card says of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.core.errors import UserError
from data_prep.options import DataOptions, LengthOptions, SourceOptions
from data_prep.prepare.prepare import Renderer, data_digest, prepare
from data_prep.records.mixing import Source, draws, sources_for
from data_prep.records.stream import Given
from data_prep.types import RowKind
from tests.tiny import tiny_tokenizer, write_jsonl

LENGTH = LengthOptions(max_length=64)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tiny_tokenizer())


def files(tmp_path: Path, **counts: int) -> dict[str, Any]:
    """A source of so many question/answer rows for every name."""
    found = {}
    for name, count in counts.items():
        rows = [{"question": f"{name} {number}?", "answer": f"{name}!"} for number in range(count)]
        found[name] = {"path": str(write_jsonl(tmp_path / f"{name}.jsonl", rows))}
    return found


def mixed(mix: dict[str, Any], **more: Any) -> DataOptions:
    return DataOptions(conversations=SourceOptions(mix=mix), **more)


def source(weight: float = 1.0, epochs: float | None = None) -> Source:
    return Source("x", Given(DataOptions(), SourceOptions()), weight, epochs)


def test_draws_by_hand() -> None:
    assert draws([100, 300], [source(), source()], 1.0) == [100, 300]
    assert draws([100, 300], [source(3.0), source()], 1.0) == [200, 200]
    assert draws([100, 400], [source(), source()], 2.0) == [167, 333]  # 10 : 20
    assert draws([100, 300], [source(epochs=2.5), source()], 1.0) == [250, 300]
    assert draws([0, 5], [source(), source()], 1.0) == [0, 5]


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0.01, 100)), min_size=1, max_size=6), st.floats(0.5, 20))
def test_weighted_draws_are_as_many_as_the_rows(sizes: list[tuple[int, float]], temperature: float) -> None:
    rows = [size for size, _ in sizes]
    found = draws(rows, [source(weight) for _, weight in sizes], temperature)
    assert all(count >= 1 for count in found) and sum(rows) <= sum(found) < sum(rows) + len(rows)


def test_what_is_drawn_is_in_the_card_and_in_the_rows(renderer: Renderer, tmp_path: Path) -> None:
    mix = files(tmp_path, big=200, small=40)
    mix["small"] |= {"weight": 5}
    prepared = prepare(RowKind.conversations, mixed(mix), renderer, LENGTH, 0)
    card = prepared.card["mixture"]["sources"]
    by_task = Counter(row.task for row in prepared.train)
    assert {name: one["drawn"] for name, one in card.items()} == by_task
    assert abs(by_task["small"] - by_task["big"]) <= 0.15 * len(prepared.train)
    assert (
        sum(one["drawn"] for one in card.values()) == len(prepared.train) == sum(o["train_rows"] for o in card.values())
    )
    assert Counter(row.task for row in prepared.eval) == {name: one["eval_rows"] for name, one in card.items()}
    assert prepared.card["rows"]["in"] == 240 == len(prepared.eval) + sum(o["train_rows"] for o in card.values())
    first = Counter(row.task for row in prepared.train[:40])  # spread evenly
    assert 17 <= first["small"] <= 23
    each = Counter(row.id for row in prepared.train if row.task == "small")
    assert max(each.values()) - min(each.values()) <= 1


def test_every_source_is_held_out_by_its_own_rule(renderer: Renderer, tmp_path: Path) -> None:
    mix = files(tmp_path, a=100, b=100)
    mix["a"] |= {"eval_share": 0.0}
    mix["b"] |= {"eval_share": 0.3}
    held = Counter(row.task for row in prepare(RowKind.conversations, mixed(mix), renderer, LENGTH, 0).eval)
    assert held["a"] == 0 and 15 < held["b"] < 45


def test_a_question_held_out_in_one_source_trains_in_none(renderer: Renderer, tmp_path: Path) -> None:
    rows = [{"question": f"question {n}?", "answer": f"answer {n}"} for n in range(60)]
    other = [{"question": row["question"], "answer": "another " + row["answer"]} for row in rows]
    mix = {
        "a": {"path": str(write_jsonl(tmp_path / "a.jsonl", rows)), "eval_share": 0.2},
        "b": {"path": str(write_jsonl(tmp_path / "b.jsonl", other)), "eval_share": 0.0},
    }
    prepared = prepare(RowKind.conversations, mixed(mix), renderer, LENGTH, 0)
    held = {renderer.decode(row.ids).split("answer")[0] for row in prepared.eval}
    assert prepared.eval and prepared.card["rows"]["dropped"] == {"question_in_eval": len(prepared.eval)}
    assert len(held) == len(prepared.eval)


def test_a_leak_is_dropped_only_where_every_source_allows_it(renderer: Renderer, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    held = write_jsonl(tmp_path / "held.jsonl", rows[:1])
    one = {"path": str(write_jsonl(tmp_path / "one.jsonl", rows)), "on_leak": "drop", "eval_share": 0.0}
    two = {"path": str(write_jsonl(tmp_path / "two.jsonl", rows)), "eval_path": str(held)}
    with pytest.raises(
        UserError, match=r"one\.jsonl:1: trains on .*, and 1 more; .* set data\.conversations\.mix\.two\.on"
    ):
        prepare(RowKind.conversations, mixed({"one": one, "two": two}), renderer, LengthOptions(64), 0)
    two["on_leak"] = "drop"
    card = prepare(RowKind.conversations, mixed({"one": one, "two": two}), renderer, LengthOptions(64), 0).card
    assert card["rows"]["dropped"] == {"leak": 2}


def test_the_seed_decides_what_is_drawn_again(renderer: Renderer, tmp_path: Path) -> None:
    mix = files(tmp_path, a=50, b=50)
    mix["a"] |= {"epochs": 1.5}
    one, same, other = (prepare(RowKind.conversations, mixed(mix), renderer, LENGTH, seed) for seed in (0, 0, 1))
    assert one.digest == same.digest != other.digest
    assert [row.id for row in one.train] == [row.id for row in same.train]


def test_data_digest_covers_every_source(tmp_path: Path) -> None:
    mix = files(tmp_path, a=5, b=5)
    first = data_digest(mixed(mix), "conversations")
    assert first == data_digest(mixed(dict(reversed(mix.items()))), "conversations")
    assert first != data_digest(mixed(mix, temperature=2.0), "conversations")
    assert first != data_digest(mixed({**mix, "a": {**mix["a"], "weight": 2}}), "conversations")
    files(tmp_path, b=6)
    assert first != data_digest(mixed(mix), "conversations")


def test_data_mix_serves_what_has_no_source(tmp_path: Path) -> None:
    found = sources_for(DataOptions(mix=files(tmp_path, a=3, b=3)), "conversation")
    assert [one.name for one in found] == ["a", "b"]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({}, "a path or a generator .got neither"),
        ({"path": "x.jsonl", "generator": "smalltalk"}, "got both"),
        ({"path": "x.jsonl", "wieght": 2}, "weight"),
        ({"path": "x.jsonl", "weight": 0}, "out of range .got 0.0; expected more than 0"),
        ({"path": "x.jsonl", "weight": float("nan")}, "expected a number"),
        ({"path": "x.jsonl", "epochs": -1}, "out of range"),
        ({"path": "x.jsonl", "epochs": 1e9}, "at most 10000"),
        ("x.jsonl", "expected a mapping"),
        ({"path": "x.jsonl", "weight": 2, "epochs": 1}, "either a weight or epochs"),
        ({"mix": {"y": {"path": "x.jsonl"}}, "path": "x.jsonl"}, "cannot be a mixture itself"),
    ],
)
def test_wrong_mixtures_are_refused(entry: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        sources_for(mixed({"a": entry}), "conversation")
    assert str(caught.value).startswith("data.conversations.mix.a")


def test_a_mix_beside_a_path_is_refused() -> None:
    data = DataOptions(conversations=SourceOptions(path="a.jsonl", mix={"a": {"path": "b.jsonl"}}))
    with pytest.raises(UserError, match="both a mix and a path"):
        sources_for(data, RowKind.conversations)
