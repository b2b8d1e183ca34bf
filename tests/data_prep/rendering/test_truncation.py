"""Rows that are too long: dropped, refused, or cut where asked; always counted, never broken."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.core.errors import UserError
from data_prep.options import DataOptions, Keep, LengthOptions, OnBadRow, OnLong, OnLongAnswer, SourceOptions
from data_prep.prepare.prepare import Prepared, Renderer, prepare
from data_prep.rendering.truncation import Shortener, TooLong, length_of
from data_prep.types import Conversation, Labelled, Message, Preference, Prompt, RowKind, Tokens
from tests.tiny import tiny_tokenizer, write_jsonl

MOST = 40


@cache
def renderer() -> Renderer:
    return Renderer(tiny_tokenizer())


def rules(on_long: OnLong = OnLong.truncate, answer: OnLongAnswer | None = None, **more: Any) -> LengthOptions:
    return LengthOptions(**{"max_length": MOST, "on_long": on_long, "max_lost": 1.0, "on_long_answer": answer, **more})


def prepared(
    tmp_path: Path, rows: list[dict[str, Any]], length: LengthOptions, kind: str = "conversations"
) -> Prepared[Any]:
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    data = DataOptions(**{kind: SourceOptions(path=str(path), eval_share=0.0)})
    found = prepare(RowKind[kind], data, renderer(), length, 0)
    counts = found.card["rows"]
    assert counts["in"] == counts["kept"] + sum(counts["dropped"].values()) == len(rows)
    assert all(length_of(row) <= length.max_length for row in found.train)
    return found


def texts(row: Any) -> str:
    return str(renderer().tokenizer.decode(row.ids if hasattr(row, "ids") else row.prompt))


SHORT = {"prompt": "hi", "completion": "yo"}
ASKED_LONG = {"prompt": "begin" + "x" * 60 + "end", "completion": "yes"}
SAID_LONG = {"prompt": "hi", "completion": "begin" + "y" * 60 + "end"}


def test_a_cut_prompt_keeps_its_end_or_its_beginning(tmp_path: Path) -> None:
    for keep, stays, goes in ((Keep.end, "end<|end|>", "begin"), (Keep.start, "<|user|>begin", "end<|end|>")):
        found = prepared(tmp_path, [SHORT, ASKED_LONG], rules(keep_prompt=keep))
        text = texts(found.train[1])
        assert stays in text and goes not in text and text.endswith("<|assistant|>yes<|end|>\n")
        assert len(found.train[1].ids) == MOST, "no more is cut than must be"
        assert found.card["rows"]["truncated"] == 1
        assert found.card["truncated_rows"] == [f"{tmp_path / 'a.jsonl'}:2"]


def test_an_answer_is_never_cut_without_being_asked(tmp_path: Path) -> None:
    for on_long in (OnLong.drop, OnLong.truncate):
        found = prepared(tmp_path, [SHORT, SAID_LONG], rules(on_long))
        assert found.card["rows"]["dropped"] == {"too_long": 1} and found.card["rows"]["truncated"] == 0
        assert found.card["long_for_their_answer"] == 1 and ":2: " in found.card["long_rows"][0]
    with pytest.raises(
        UserError, match=r"1 of 2 rows .* max_length=40 tokens, 1 for their answers: .*:2 \(\d+ tokens\)"
    ):
        prepared(tmp_path, [SHORT, SAID_LONG], rules(OnLong.truncate, OnLongAnswer.error))
    with pytest.raises(UserError, match="for their answers"):
        prepared(tmp_path, [SHORT, SAID_LONG], rules(OnLong.error))


def test_a_cut_answer_keeps_its_end_token(tmp_path: Path) -> None:
    for on_long in (OnLong.drop, OnLong.truncate):
        row = prepared(tmp_path, [SAID_LONG], rules(on_long, OnLongAnswer.truncate)).train[0]
        assert len(row.ids) == MOST and texts(row).startswith("<|user|>hi<|end|>\n<|assistant|>begin")
        assert row.ids[-2] == renderer().end_token_id and row.mask[-2], "the end is there and supervised"


def test_an_answer_without_its_end_only_on_request(tmp_path: Path) -> None:
    row = prepared(tmp_path, [SAID_LONG], rules(OnLong.drop, OnLongAnswer.open)).train[0]
    assert len(row.ids) == MOST and row.mask[-1] and renderer().end_token_id not in row.ids[-20:]


def test_both_parts_too_long(tmp_path: Path) -> None:
    row = {"prompt": "q" * 90, "completion": "a" * 90}
    found = prepared(tmp_path, [SHORT, row], rules(OnLong.truncate, OnLongAnswer.truncate)).train[1]
    said = found.mask.count(True)
    assert 15 <= said <= MOST // 2 and texts(found).count("q") > 5 and found.ids[-2] == renderer().end_token_id
    assert prepared(tmp_path, [SHORT, row], rules()).card["rows"]["dropped"] == {"too_long": 1}


def test_the_longer_part_is_to_blame_where_nothing_is_cut(tmp_path: Path) -> None:
    mixed = rules(OnLong.error, OnLongAnswer.drop)
    assert prepared(tmp_path, [SHORT, SAID_LONG], mixed).card["rows"]["dropped"] == {"too_long": 1}
    with pytest.raises(UserError, match=r"1 of 2 rows .50.0%. are longer than max_length=40 tokens: .*:2 \("):
        prepared(tmp_path, [SHORT, ASKED_LONG], mixed)


def test_losing_too_many_stops_and_cut_rows_are_not_lost(tmp_path: Path) -> None:
    rows = [SHORT, ASKED_LONG, SAID_LONG] * 10
    with pytest.raises(UserError, match=r"10 of 30 rows .33.3%, over max_lost=0.3. .* 10 for their answers") as caught:
        prepared(tmp_path, rows, rules(max_lost=0.3))
    assert len(caught.value.details) == 10
    with pytest.raises(UserError, match=r"20 of 30 rows .66.7%, over max_lost=0.3"):
        prepared(tmp_path, rows, rules(OnLong.drop, max_lost=0.3))
    card = prepared(tmp_path, rows * 3, rules(OnLong.drop)).card
    assert card["rows"]["dropped"] == {"too_long": 60} and len(card["long_rows"]) == 20
    assert prepared(tmp_path, rows, rules(max_lost=0.34)).card["rows"]["truncated"] == 10


# ------------------------------------------------------------------------------------------------------------- pairs
def test_pairs_that_are_equal_once_cut_are_bad_rows(tmp_path: Path) -> None:
    """Known bug 15: both replies share their beginning, and only their beginning is left."""
    row = {"prompt": "hi", "chosen": "s" * 60 + "yes", "rejected": "s" * 60 + "no"}
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, row]
    for answer in (OnLongAnswer.truncate, OnLongAnswer.open):
        length = rules(OnLong.drop, answer)
        with pytest.raises(UserError, match=r"a\.jsonl:2: chosen and rejected are the same after truncation") as caught:
            prepared(tmp_path, rows, length, "preferences")
        assert caught.value.exit_code == 2
        data = DataOptions(
            preferences=SourceOptions(str(tmp_path / "a.jsonl"), eval_share=0.0, on_bad_row=OnBadRow.drop)
        )
        card = prepare(RowKind.preferences, data, renderer(), length, 0).card
        assert card["rows"] == {"in": 2, "kept": 1, "dropped": {"identical_pair": 1}, "truncated": 0}
    assert prepared(tmp_path, rows, rules(), "preferences").card["rows"]["dropped"] == {"too_long": 1}


def test_a_pair_shares_its_cut_prompt(tmp_path: Path) -> None:
    row = {"prompt": "begin" + "x" * 60, "chosen": "yes", "rejected": "absolutely not"}
    pair = prepared(tmp_path, [row], rules(), "preferences").train[0]
    assert pair.chosen == renderer().reply("yes") and pair.rejected == renderer().reply("absolutely not")
    assert len(pair.prompt) + len(pair.rejected) == MOST and "begin" not in texts(pair)


# --------------------------------------------------------------------------------------------------------- dialogues
def talk(turns: int, size: int = 4, system: str = "") -> dict[str, Any]:
    said = [{"role": "system", "content": system}] if system else []
    for number in range(turns):
        said.append({"role": "user", "content": f"q{number}" * size})
        said.append({"role": "assistant", "content": f"a{number}" * size})
    return {"messages": said}


def test_a_dialogue_loses_whole_exchanges_first(tmp_path: Path) -> None:
    found = prepared(tmp_path, [talk(5, system="be")], rules(max_length=60)).train[0]
    assert texts(found) == (
        "<|system|>be<|end|>\n<|user|>q3q3q3q3<|end|>\n<|assistant|>a3a3a3a3<|end|>\n"
        "<|user|>q4q4q4q4<|end|>\n<|assistant|>a4a4a4a4<|end|>\n"
    )
    kept = prepared(tmp_path, [talk(5, system="be")], rules(max_length=60, keep_prompt=Keep.start)).train[0]
    assert "q0" in texts(kept) and "q1" in texts(kept) and "q2" not in texts(kept)
    assert kept.ids[-2] == renderer().end_token_id and kept.mask[-2]


def test_what_stands_behind_the_last_answer_goes_first(tmp_path: Path) -> None:
    row = talk(1)
    row["messages"].append({"role": "user", "content": "and" * 30})
    found = prepared(tmp_path, [row], rules()).train[0]
    assert texts(found) == "<|user|>q0q0q0q0<|end|>\n<|assistant|>a0a0a0a0<|end|>\n"


def test_prompts_keep_room_and_their_question(tmp_path: Path) -> None:
    rows = [{"prompt": talk(4)["messages"][:-1]}, {"prompt": "x" * 90 + "?"}]
    found = prepared(tmp_path, rows, rules(), "prompts")
    assert (
        texts(found.train[0]).endswith("<|user|>q3q3q3q3<|end|>\n<|assistant|>") and found.train[0].text == "q3q3q3q3"
    )
    assert texts(found.train[1]).endswith("x?<|end|>\n<|assistant|>") and len(found.train[1].ids) == MOST
    assert found.card["rows"]["truncated"] == 2


# -------------------------------------------------------------------------------------------------------- properties
words = st.text("abc \n<|>", min_size=1, max_size=3 * MOST).filter(lambda text: bool(text.strip()))
lengths = st.builds(
    rules,
    on_long=st.sampled_from(OnLong),
    answer=st.none() | st.sampled_from(OnLongAnswer),
    keep_prompt=st.sampled_from(Keep),
    max_length=st.integers(2, MOST),
)


def check_cut(record: Any, row: Any, length: LengthOptions) -> None:
    """A shortened row is within the limit, starts and ends as it must, and supervises something; else it says why."""
    short = Shortener(renderer(), length).shorten(record, row)
    if isinstance(short, TooLong):
        assert short.rule in ("error", "drop", "truncate", "open") and short.tokens == length_of(row)
        return
    assert 0 < length_of(short) <= length.max_length < length_of(row)
    first = renderer().tokenizer.convert_tokens_to_ids("<|user|>")
    starts = (short.ids if hasattr(short, "ids") else short.prompt)[0]
    assert starts in (first, renderer().tokenizer.convert_tokens_to_ids("<|system|>"))
    opened = length.on_long_answer is OnLongAnswer.open
    if isinstance(short, Tokens):
        assert len(short.ids) == len(short.mask) and any(short.mask[1:])
        last = len(short.mask) - 1 - short.mask[::-1].index(True)
        assert opened or short.ids[last] == renderer().end_token_id
        assert sum(short.mask) <= sum(row.mask)
    for name in ("chosen", "rejected", "reply"):
        if hasattr(short, name):
            assert getattr(short, name) and (opened or getattr(short, name)[-1] == renderer().end_token_id)


@settings(max_examples=150, deadline=None)
@given(said=st.lists(words, min_size=2, max_size=6), length=lengths, system=st.booleans())
def test_any_dialogue(said: list[str], length: LengthOptions, system: bool) -> None:
    turns = [Message("user" if n % 2 == 0 else "assistant", text) for n, text in enumerate(said[: len(said) // 2 * 2])]
    record = Conversation((*([Message("system", "s")] if system else []), *turns), "f:1")
    row = renderer().conversation(record)
    if length_of(row) > length.max_length:
        check_cut(record, row, length)


@settings(max_examples=150, deadline=None)
@given(asked=words, chosen=words, rejected=words, length=lengths)
def test_any_pair_label_and_prompt(asked: str, chosen: str, rejected: str, length: LengthOptions) -> None:
    prompt = (Message("user", asked),)
    pair, label = Preference(prompt, chosen, rejected, "f:1"), Labelled(prompt, chosen, True, "f:1")
    records: list[Any] = [pair, label, Prompt(prompt, "f:1")]
    rows = [renderer().pair(pair), renderer().labelled([label])[0], renderer().prompts([records[2]])[0]]
    for record, row in zip(records, rows, strict=True):
        if length_of(row) > length.max_length:
            check_cut(record, row, length)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 3 * MOST), st.integers(1, 3 * MOST)), min_size=1, max_size=6),
    length=lengths,
)
def test_counts_always_add_up(sizes: list[tuple[int, int]], length: LengthOptions, tmp_path_factory: Any) -> None:
    rows = [{"prompt": "q" * ask, "completion": "a" * say} for ask, say in sizes]
    try:
        prepared(tmp_path_factory.mktemp("rows"), rows, length)
    except UserError as problem:
        assert problem.code in ("too_long", "no_rows") and "\n" not in str(problem)


def test_unpaired_rows_too(tmp_path: Path) -> None:
    rows = [
        {"prompt": "x" * 90, "completion": "yes", "label": True},
        {"prompt": "hi", "completion": "n" * 90, "label": False},
    ]
    data = DataOptions(preferences=SourceOptions(path=str(write_jsonl(tmp_path / "a.jsonl", rows)), eval_share=0.0))
    card = prepare(RowKind.unpaired, data, renderer(), rules(), 0).card
    assert card["rows"] == {"in": 2, "kept": 1, "dropped": {"too_long": 1}, "truncated": 1}
