"""Columns that a recipe makes: renamed, put together from templates, taken out of texts by patterns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.core.errors import UserError
from data_prep.options import DataOptions, SourceOptions
from data_prep.records.stream import source_for
from data_prep.sources.column_mapping import Columns, Patterns, mapped
from data_prep.sources.rows import Row
from tests.records import read_records
from tests.tiny import write_jsonl

ROW = {"q": "why?", "a": "so", "n": 3, "deep": {"x": [{"y": "in"}]}, "a.b": "dotted", "none": None, "flag": True}


def made(columns: dict[str, str], data: dict[str, Any] = ROW) -> dict[str, Any]:
    return Columns(columns, data).apply(Row("f", 1, dict(data))).data


@pytest.mark.parametrize(
    ("columns", "name", "value"),
    [
        ({"prompt": "q"}, "prompt", "why?"),
        ({"q": "prompt"}, "prompt", "why?"),  # theirs to ours, as it used to be written
        ({"prompt": "{q}"}, "prompt", "why?"),
        ({"prompt": "Q: {q}\n\n{n} {{x}}"}, "prompt", "Q: why?\n\n3 {x}"),
        ({"prompt": "deep.x.0.y"}, "prompt", "in"),
        ({"prompt": "<{deep.x.0.y}>"}, "prompt", "<in>"),
        ({"prompt": "a.b"}, "prompt", "dotted"),
        ({"q": "a"}, "q", "so"),
        ({"q": "a", "a": "q"}, "a", "why?"),
    ],
)
def test_columns(columns: dict[str, str], name: str, value: str) -> None:
    assert made(columns)[name] == value


def test_renamed_columns_go_and_others_stay() -> None:
    assert "q" not in made({"prompt": "q"}) and made({"prompt": "q"})["a"] == "so"
    assert made({"prompt": "{q}"})["q"] == "why?"
    assert made({"prompt": "q", "question": "q"})["question"] == made({"prompt": "q", "question": "q"})["prompt"]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"prompt": "qq"}, r"columns\.prompt: the rows have no column 'qq' \(did you mean 'q'\?"),
        ({"prompt": "{deap.x}"}, "no column 'deap.x'"),
        ({"prompt": "{q!r}"}, "holds more than {column}"),
        ({"prompt": "{q:>10}"}, "holds more than {column}"),
        ({"prompt": "{}"}, "holds more than {column}"),
        ({"prompt": "{q"}, "is no template"),
        ({"prompt": "q}"}, "is no template"),
    ],
)
def test_bad_options_are_said_once(columns: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        made(columns)
    assert caught.value.row is None and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "field", "words"),
    [
        ({"prompt": "{none}"}, "none", "got null"),
        ({"prompt": "{flag}"}, "flag", "got true or false"),
        ({"prompt": "{deep}"}, "deep", "got an object"),
        ({"prompt": "{deep.x.1.y}"}, "deep.x.1.y", "is missing"),
        ({"prompt": "deep.z"}, "deep.z", "is missing"),
        ({"prompt": "{q.upper}"}, "q.upper", "is missing"),
    ],
)
def test_rows_that_lack_what_a_column_is_made_of(columns: dict[str, str], field: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        made(columns)
    assert str(caught.value).startswith(f"f:1:{field}: ")


def test_templates_hold_no_code() -> None:
    for text in ("{q.__class__}", "{q.__class__.__mro__}", "{deep.__init__.__globals__}", "{a[0]}"):
        with pytest.raises(UserError):
            made({"prompt": text})


# ---------------------------------------------------------------------------------------------------------- patterns
@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        ("IN: {prompt} OUT: {completion}", "IN: go left OUT: L", {"prompt": "go left", "completion": "L"}),
        ("{prompt}||{completion}", " a || b || c ", {"prompt": "a", "completion": "b || c"}),
        ("{a} (.*) {b}", "x (.*) y", {"a": "x", "b": "y"}),
        ("{{{a}}}", "{x}", {"a": "x"}),
    ],
)
def test_patterns(pattern: str, text: str, expected: dict[str, str]) -> None:
    data = Patterns({"text": pattern}).apply(Row("f", 1, {"text": text})).data
    assert data == {"text": text, **expected}


def test_texts_that_do_not_fit() -> None:
    pattern = Patterns({"text": "IN: {a} OUT: {b}"})
    for text in ("", "IN: x", "OUT: x IN: y", 3, None):
        with pytest.raises(UserError) as caught:
            pattern.apply(Row("f", 4, {"text": text}))
        assert str(caught.value).startswith("f:4:text: ") and "expected" in str(caught.value)
    for wrong in ("no field", "{a}{b}", "{a} {a}", "{}", "{a!r} x {b}"):
        with pytest.raises(UserError, match=r"parse\.text: "):
            Patterns({"text": wrong})


@given(left=st.text("ab| \n", min_size=1), right=st.text("ab| \n"))
def test_a_pattern_splits_at_the_first_place(left: str, right: str) -> None:
    text = f"{left}||{right}"
    data = Patterns({"text": "{x}||{y}"}).apply(Row("f", 1, {"text": text})).data
    before, _, behind = text.strip().partition("||")
    assert (data["x"], data["y"]) == (before.strip(), behind.strip())


@pytest.mark.timeout(240)  # one that goes back takes hours; this one takes a tenth of a second
def test_patterns_take_linear_time() -> None:
    pattern = Patterns({"text": "{a} OUT: {b} OUT: {c} END"})
    with pytest.raises(UserError):
        pattern.apply(Row("f", 1, {"text": " OUT: " * 200_000}))


# ------------------------------------------------------------------------------------------------------------- whole
def test_a_new_data_set_is_one_recipe(tmp_path: Path) -> None:
    rows = [{"title": "Snow", "facts": {"who": "Ann"}, "said": "It snows.", "input": ""}, {"title": "Sun", "said": "x"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    columns = {"prompt": "Tell of {title} and {facts.who}.", "completion": "said"}
    data = DataOptions(conversations=SourceOptions(path=str(path), columns=columns))
    records, tally, about = read_records(source_for(data, "conversation"), "conversation", 0)
    assert [m.content for m in records[0].messages] == ["Tell of Snow and Ann.", "It snows."]
    assert str(tally.problems[0]).startswith(f"{path}:2:facts.who: is missing")
    assert about["format"] == "prompt_completion" and "unused" in about["evidence"]


def test_the_names_are_those_of_the_first_rows() -> None:
    rows = [Row("f", n, {"q": "x", **({"extra": "y"} if n == 40 else {})}) for n in range(1, 60)]
    assert len(list(mapped(iter(rows), {"note": "extra"}, {}))) == 59
    with pytest.raises(UserError, match="no column 'extr'"):
        list(mapped(iter(rows), {"note": "extr"}, {}))


def test_streams() -> None:
    """Rows come out as they come in: nothing waits for the end of a file."""
    taken = []

    def rows() -> Any:
        for n in range(10_000):
            taken.append(n)
            yield Row("f", n + 1, {"q": str(n)})

    assert next(mapped(rows(), {"prompt": "q"}, {})).data == {"prompt": "0"}  # type: ignore[union-attr]
    assert len(taken) <= 50
