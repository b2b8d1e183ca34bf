"""Faults of masks and of truncation, put into the code one at a time: for each, tests of this folder must fail.

They are the field's own: an end of turn that is not learnt, a question in the loss, an answer cut without its end
(trl#5988, trl#1623, OpenRLHF#1311), the wrong end of a prompt cut off, limits off by one, rows trained on nothing.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from data_prep.core.errors import UserError
from data_prep.records import tally as filtering
from data_prep.rendering import renderer as rendering
from data_prep.rendering import truncation as shortening
from data_prep.rendering.renderer import Renderer
from data_prep.rendering.truncation import Shortener
from tests.data_prep.rendering import test_rendering, test_truncation
from tests.tiny import tiny_tokenizer

Check = Callable[[Renderer, Path], None]


def mask(tiny: Renderer, tmp_path: Path) -> None:
    test_rendering.test_mask_covers_the_replies_and_their_end_and_nothing_else({"tiny": tiny}, "tiny")


def flags(tiny: Renderer, tmp_path: Path) -> None:
    test_rendering.test_train_false_leaves_a_turn_out_without_changing_ids(tiny)


def question(tiny: Renderer, tmp_path: Path) -> None:
    test_truncation.test_a_cut_prompt_keeps_its_end_or_its_beginning(tmp_path)


def answer(tiny: Renderer, tmp_path: Path) -> None:
    test_truncation.test_a_cut_answer_keeps_its_end_token(tmp_path)


def unasked(tiny: Renderer, tmp_path: Path) -> None:
    test_truncation.test_an_answer_is_never_cut_without_being_asked(tmp_path)


def shared(tiny: Renderer, tmp_path: Path) -> None:
    test_truncation.test_a_pair_shares_its_cut_prompt(tmp_path)


def exchanges(tiny: Renderer, tmp_path: Path) -> None:
    test_truncation.test_a_dialogue_loses_whole_exchanges_first(tmp_path)


def behind(tiny: Renderer, tmp_path: Path) -> None:
    test_truncation.test_what_stands_behind_the_last_answer_goes_first(tmp_path)


def loss(tiny: Renderer, tmp_path: Path) -> None:
    test_truncation.test_losing_too_many_stops_and_cut_rows_are_not_lost(tmp_path)


MUTANTS: list[tuple[str, Any, str, str, Check]] = [
    # (fault, function, code, code with the fault, test that must fail)
    (
        "the end of a turn is not learnt",
        Renderer._encode_all,
        "piece.turn is not None]",
        "piece.turn is not None and control is None]",
        mask,
    ),
    (
        "the question is learnt",
        Renderer._pieces,
        "(place, span[0], None), (*span, number)",
        "(place, span[1], number)",
        mask,
    ),
    ("everything is learnt", Renderer._encode_all, "[piece.turn is not None]", "[True]", mask),
    ("nothing is learnt", Renderer._encode_all, "[piece.turn is not None]", "[False]", mask),
    (
        "the mask is moved by one",
        Renderer._encode_all,
        "Encoded(ids, mask, weights)",
        "Encoded(ids, [False, *mask[:-1]], weights)",
        mask,
    ),
    ("train: false is not heard", rendering._as_asked, "not said.trained", "False", flags),
    ("answers lose their end", Shortener.shorten, "self._cut_answer(record, cuts_prompt)", "self._opened(row)", answer),
    ("answers are cut unasked", Shortener.shorten, "self._answers is OnLongAnswer.truncate", "True", unasked),
    ("the wrong end of the question goes", shortening._cut_text, "keep is Keep.end", "keep is not Keep.end", question),
    ("one character too much goes", shortening.most, "return low", "return max(low - 1, 0)", question),
    (
        "a token too many stays",
        Shortener._fits,
        "self._length.max_length if",
        "self._length.max_length + 1 if",
        question,
    ),
    ("the shorter side of a pair counts", shortening.length_of, "max(len", "min(len", shared),
    (
        "the last exchange goes first",
        shortening.shorter_prompt,
        "rest[starts[-number] :]",
        "rest[: starts[number - 1] + 2]",
        exchanges,
    ),
    ("the answer goes with what is behind it", shortening._trimmed, "last + 1", "last", behind),
    ("no loss is too great", filtering.check_long, "not strict and share <= length.max_lost", "not strict", loss),
]


@pytest.fixture(scope="module")
def tiny() -> Renderer:
    return Renderer(tiny_tokenizer())


def with_fault(function: FunctionType, code: str, fault: str) -> Any:
    """The compiled code of a function with a part of its source replaced."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(code) == 1, f"{code!r} stands {source.count(code)} times in {function.__qualname__}"
    names = dict(function.__globals__)
    exec(compile("from __future__ import annotations\n" + source.replace(code, fault), "fault", "exec"), names)
    return names[function.__name__].__code__


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant[0] for mutant in MUTANTS])
def test_a_test_fails_for_every_fault(
    tiny: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: tuple[str, Any, str, str, Check]
) -> None:
    _, function, code, fault, check = mutant
    check(tiny, tmp_path)
    monkeypatch.setattr(function, "__code__", with_fault(function, code, fault))
    with pytest.raises((AssertionError, UserError, ValueError, IndexError, pytest.fail.Exception)):
        check(tiny, tmp_path)
