"""`align eval RUN/reward_model pairs=FILE`: accuracy by section and subset of a RewardBench-shaped file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from align.evaluation.options import PairsOptions
from align.evaluation.pairs import SECTIONS, ordered_pairs, pairs_contents, pairs_refusals, read_pairs
from data_prep.core.errors import UserError
from data_prep.rendering.renderer import Renderer
from reward.metrics import accuracy_interval
from tests.tiny import tiny_tokenizer, write_jsonl

ROWS = [
    {"prompt": "p", "chosen": "long reply", "rejected": "no", "subset": "hep-cpp", "chosen_model": "x", "id": 1},
    {"prompt": "p", "chosen": "a", "rejected": "longer", "subset": "math-prm", "chosen_model": "x", "id": 2},
    {"prompt": "p", "chosen": "same", "rejected": "tied", "subset": "donotanswer", "chosen_model": "x", "id": 3},
    {"prompt": "p", "chosen": "better", "rejected": "so", "subset": "mine", "chosen_model": "x", "id": 4},
    {"prompt": "p" * 90, "chosen": "better", "rejected": "so", "subset": "mine", "chosen_model": "x", "id": 5},
]


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(write_jsonl(tmp_path / "pairs.jsonl", ROWS))


def longest_first(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
    """A reward model that likes long replies."""
    return [float(len(reply)) for _, reply in pairs]


def test_accuracy_by_section_and_subset_by_hand(file: str) -> None:
    rows, subsets, long = read_pairs(file, Renderer(tiny_tokenizer()), 60)
    assert (len(rows), subsets, long) == (4, ["hep-cpp", "math-prm", "donotanswer", "mine"], 1)
    found = ordered_pairs(rows, subsets, longest_first)
    assert (found["accuracy"], found["low"], found["high"]) == accuracy_interval(2.5, 4) and found["n"] == 4
    assert {name: (row["accuracy"], row["n"]) for name, row in found["sections"].items()} == {
        "Reasoning": (0.5, 2),
        "Safety": (0.5, 1),
        "mine": (1.0, 1),
    }
    assert found["subsets"]["hep-cpp"]["accuracy"] == 1.0 and found["subsets"]["math-prm"]["accuracy"] == 0.0


def test_a_section_of_the_file_goes_before_its_subset(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "section": "code"}]
    found = read_pairs(str(write_jsonl(tmp_path / "a.jsonl", rows)), Renderer(tiny_tokenizer()), None)
    assert found[1] == ["code"]
    bare = [{key: ROWS[0][key] for key in ("prompt", "chosen", "rejected")}]
    assert read_pairs(str(write_jsonl(tmp_path / "b.jsonl", bare)), Renderer(tiny_tokenizer()), None)[1] == ["all"]


def test_the_sections_are_those_of_the_paper() -> None:
    assert [len(subsets) for subsets in SECTIONS.values()] == [5, 6, 5, 7]


def test_what_cannot_be_ordered_is_refused(file: str) -> None:
    assert not list(pairs_refusals(PairsOptions(), "stages.evaluate", has_reward=False))
    (no_file,) = pairs_refusals(PairsOptions(pairs="nowhere.jsonl"), "stages.evaluate", has_reward=True)
    assert "nowhere.jsonl" in str(no_file)
    (no_judge,) = pairs_refusals(PairsOptions(pairs=file), "stages.evaluate", has_reward=False)
    assert "stages.evaluate.reward=RUN/reward_model" in str(no_judge)
    with pytest.raises(UserError, match="fits into 5 tokens"):
        read_pairs(file, Renderer(tiny_tokenizer()), 5)
    before = pairs_contents(PairsOptions(pairs=file))
    write_jsonl(file, ROWS[:1])
    assert pairs_contents(PairsOptions(pairs=file)) != before


def test_a_reward_model_is_a_target(file: str, tmp_path: Path, capsys: Any) -> None:
    from align.cli.dispatch import main
    from tests.tiny_chain import made

    run = made("reward_model", "name=n", out=tmp_path)
    words = ["eval", f"{run}/reward_model", f"out={tmp_path}", f"pairs={file}", "prompts=3", "max_new_tokens=4"]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["pairs"]["n"] == 5 and set(result["pairs"]["sections"]) == {"Reasoning", "Safety", "mine"}
    assert list(result["stages"]) == ["base"] and result["stages"]["base"]["score"] is not None
    assert any("benchmark pairs rightly" in sentence for sentence in result["verdict"]["sentences"])
