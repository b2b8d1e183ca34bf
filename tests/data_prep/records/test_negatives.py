"""Negatives: what they are made of, on which side they stand, and what the card says of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from align.config.compose import compose
from data_prep.core.errors import UserError
from data_prep.options import DataOptions, LengthOptions, SourceOptions
from data_prep.prepare.prepare import Renderer, data_digest, prepare
from data_prep.records.negatives import KINDS, Negatives, negatives_of
from data_prep.records.stream import check_options, source_for
from data_prep.types import CONVERSATION, PREFERENCE, PROMPT, Message, Preference
from tests.tiny import tiny_tokenizer, write_jsonl

ALL = dict.fromkeys(KINDS, 1.0)


def pair(number: int, **meta: Any) -> Preference:
    topic = number % 5
    good, bad = f"oh joy it is topic {topic} !", f"this is about {topic} ."
    return Preference((Message("user", f"question {number} please"),), good, bad, f"a/b.jsonl:{number}", None, meta)


def made(pairs: list[Preference], shares: dict[str, float] | None = None, seed: int = 0) -> list[Preference]:
    return list(Negatives(shares or ALL, SourceOptions(eval_share=0.0), seed).through(pairs))[len(pairs) :]


def test_every_kind_says_what_it_should() -> None:
    pairs = [pair(number, topic=f"t{number % 5}") for number in range(40)]
    replies = {text for one in pairs for text in (one.chosen, one.rejected)}
    found = made(pairs)
    assert Counter(one.meta["task"] for one in found) == dict.fromkeys(KINDS, 40)
    for one in found:
        own = next(each for each in pairs if one.id.startswith(f"{each.id}#"))
        assert one.prompt == own.prompt and one.meta["topic"] == own.meta["topic"]
        kind, words = one.meta["task"], sorted(one.rejected.split())
        assert one.chosen == (own.rejected if kind == "off_topic" else own.chosen)
        if "off_topic" in kind:
            assert one.rejected in {each.chosen for each in pairs if each.meta["topic"] != own.meta["topic"]}
        else:
            assert one.rejected not in replies
        assert kind != "truncated" or own.chosen.startswith(one.rejected + " ")
        assert kind != "repeated" or (set(words) == set(own.chosen.split()) and len(words) > 7)
        assert kind != "shuffled" or words == sorted(own.chosen.split())


def test_draws_depend_on_the_seed_and_on_nothing_else() -> None:
    pairs = [pair(number) for number in range(30)]
    elsewhere = [Preference(p.prompt, p.chosen, p.rejected, f"other:{p.id}", None, {}) for p in reversed(pairs)]
    said = [{(p.prompt, p.chosen, p.rejected, p.meta["task"]) for p in made(rows)} for rows in (pairs, elsewhere)]
    assert said[0] == said[1]
    assert {(p.prompt, p.chosen, p.rejected, p.meta["task"]) for p in made(pairs, seed=1)} != said[0]


@pytest.mark.parametrize("declared", [True, False], ids=["split", "hash"])
def test_sides_stay_apart(declared: bool) -> None:
    """What a training negative is made of stands in training rows alone, and the held-out questions are the same."""
    rows = [
        Preference(
            (Message("user", f"question {n}"),), f"reply {n} yes", f"reply {n} no", str(n), None,
            {"split": "eval" if n % 4 == 0 else "train"} if declared else {},
        )
        for n in range(200)
    ]  # fmt: skip
    every = list(Negatives({"off_topic": 1, "same_style_off_topic": 2}, SourceOptions(eval_share=0.2), 0).through(rows))
    held = {one.chosen for one in rows if one.meta["split"] == "eval"}
    assert len(held) == 50 if declared else 20 < len(held) < 60
    for one in every[len(rows) :]:
        own = next(row for row in rows if row.prompt == one.prompt)
        assert one.meta["split"] == own.meta["split"]
        assert (one.rejected in held) == (own.meta["split"] == "eval")


def test_a_training_row_whose_question_evaluates_gives_nothing() -> None:
    rows = [pair(1, split="eval"), pair(1, split="train"), *(pair(n, split="train") for n in range(2, 20))]
    rows += [pair(n, split="eval") for n in range(20, 30)]
    assert not [one for one in made(rows, {"shuffled": 1.0}) if one.prompt == rows[0].prompt and "train" in one.meta]
    assert len([one for one in made(rows, {"shuffled": 1.0}) if one.prompt == rows[0].prompt]) == 1


def test_flips_and_margins_are_the_rows_own() -> None:
    rows = [Preference(p.prompt, p.chosen, p.rejected, p.id, 2.0, {"flip": True}) for p in map(pair, range(20))]
    assert not any("flip" in one.meta or one.margin is not None for one in made(rows))


def test_shares_are_drawn_and_counted() -> None:
    negatives = Negatives({"truncated": 0.25, "off_topic": 1.5}, SourceOptions(), 0)
    every = list(negatives.through([pair(number) for number in range(800)]))
    card = negatives.card()
    assert abs(card["truncated"]["pairs"] - 200) < 50 and abs(card["off_topic"]["pairs"] - 1200) < 60
    assert card["off_topic"]["pairs"] + card["truncated"]["pairs"] == len(every) - 800
    assert card["off_topic"]["share"] == round(card["off_topic"]["pairs"] / len(every), 4)


def test_what_a_row_cannot_give_is_counted() -> None:
    rows = [
        Preference((Message("user", f"q {n}"),), "same", f"bad {n}", f"f:{n}", None, {}) for n in range(6)
    ]  # fmt: skip
    negatives = Negatives(ALL, SourceOptions(eval_share=0.0), 0)
    kinds = Counter(one.meta.get("task") for one in negatives.through(rows))
    assert kinds["same_style_off_topic"] == kinds["off_topic"] == 0, "there is no other good reply"
    assert negatives.card()["off_topic"]["impossible"] == 6
    assert kinds["truncated"] == kinds["shuffled"] == 6, "a reply of one word is damaged by characters"


def test_scripts_without_spaces_are_damaged_too() -> None:
    rows = [
        Preference((Message("user", f"問 {n}"),), "今日は天気がとてもいいです", "いいえ", f"f:{n}", None, {})
        for n in range(3)
    ]
    cut = [one for one in made(rows, {"truncated": 1.0})]
    assert cut and all("今日は天気がとてもいいです".startswith(one.rejected) and " " not in one.rejected for one in cut)


# ------------------------------------------------------------------------------------------------------- options
def test_kinds_and_numbers_are_read() -> None:
    assert negatives_of(SourceOptions(negatives=["off_topic", "shuffled"])) == {"off_topic": 1.0, "shuffled": 1.0}
    mixed = SourceOptions(negatives=["off_topic", {"shuffled": 0.5, "truncated": 0}])
    assert negatives_of(mixed) == {"off_topic": 1.0, "shuffled": 0.5}
    assert negatives_of(SourceOptions()) == {}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (["of_topic"], "did you mean 'off_topic'"),
        ([{"truncated": -1}], "for truncated (got -1"),
        ([{"truncated": float("nan")}], "for truncated (got nan"),
        ([{"truncated": True}], "for truncated (got True"),
        ([3], "unknown kind of negatives"),
        ([["truncated"]], "unknown kind of negatives"),
    ],
)
def test_wrong_values_are_refused(value: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        negatives_of(SourceOptions(negatives=value))
    assert said in str(caught.value) and str(caught.value.field).startswith("data.preferences.negatives")


def test_they_are_for_pairs_alone(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}]))
    data = DataOptions(conversations=SourceOptions(path=path, negatives=["shuffled"]))
    with pytest.raises(UserError, match="is not read"):
        check_options(source_for(data, CONVERSATION), CONVERSATION)
    pairs = DataOptions(preferences=SourceOptions(path=path, negatives=["shuffled"]))
    check_options(source_for(pairs, PREFERENCE), PREFERENCE)
    check_options(source_for(pairs, PROMPT), PROMPT)


def test_the_recipe_and_the_command_line_set_them() -> None:
    def kinds(*words: str) -> Any:
        return compose(["pipeline=reward_model", "stages.reward_model.init=R/sft", *words]).stages[0].data.preferences

    assert "off_topic" in negatives_of(kinds())
    assert negatives_of(kinds("data.preferences.negatives=[truncated]")) == {"truncated": 1.0}
    assert negatives_of(kinds("data.preferences.negatives=[{truncated: 0.5}]")) == {"truncated": 0.5}
    assert negatives_of(kinds("data.preferences.negatives=[]")) == {}


# ------------------------------------------------------------------------------------------------------ whole way
def test_the_data_card_counts_them_and_the_rows_know_their_kind(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {n}", "chosen": f"good reply {n}", "rejected": f"bad reply {n}"} for n in range(120)]
    path = str(write_jsonl(tmp_path / "pairs.jsonl", rows))
    plain = DataOptions(preferences=SourceOptions(path=path, eval_share=0.2))
    data = DataOptions(preferences=SourceOptions(path=path, eval_share=0.2, negatives=["off_topic", "repeated"]))
    renderer = Renderer(tiny_tokenizer())
    before, prepared = (prepare(PREFERENCE, one, renderer, LengthOptions(128), 0) for one in (plain, data))
    assert len(prepared.train) == 3 * len(before.train) and len(prepared.eval) == 3 * len(before.eval)
    assert Counter(row.task for row in prepared.eval) == dict.fromkeys(
        [None, "off_topic", "repeated"], len(before.eval)
    )
    assert prepared.card["negatives"]["off_topic"] == {"per_row": 1.0, "pairs": 120, "share": 0.3333}
    assert prepared.card["rows"]["in"] == 360 and prepared.card["splits"]["rule"] == before.card["splits"]["rule"]
    assert data_digest(plain, "preferences") != data_digest(data, "preferences")


def test_a_mixture_takes_them_for_all_its_sources(tmp_path: Path) -> None:
    mix: dict[str, Any] = {}
    for name in "ab":
        rows = [{"prompt": f"{name} {n}", "chosen": f"good {name} {n}", "rejected": f"bad {n}"} for n in range(40)]
        mix[name] = {"path": str(write_jsonl(tmp_path / f"{name}.jsonl", rows))}
    mix["b"]["negatives"] = [{"shuffled": 2}]
    data = DataOptions(preferences=SourceOptions(mix=mix, negatives=["truncated"]))
    prepared = prepare(PREFERENCE, data, Renderer(tiny_tokenizer()), LengthOptions(128), 0)
    counts = Counter(row.task for row in [*prepared.train, *prepared.eval])
    assert counts["truncated"] == 40 and counts["shuffled"] > 60
    assert {name: set(one["negatives"]) for name, one in prepared.card["sources"].items()} == {
        "a": {"truncated"}, "b": {"shuffled"}
    }  # fmt: skip
