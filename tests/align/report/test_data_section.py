"""The data section of a report, on the data cards that a preparation writes."""

from __future__ import annotations

import json
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from align.report.page import write_report
from data_prep.options import DataOptions, LengthOptions, OnLeak, SourceOptions
from data_prep.prepare.prepare import Renderer, prepare
from data_prep.types import RowKind
from tests.run_folder import fake_run
from tests.tiny import tiny_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tiny_tokenizer())


def page(folder: Path, card: dict[str, Any]) -> str:
    """The report of a run whose supervised tuning has this data card."""
    run = fake_run(folder)
    (run / "sft" / "data_card.json").write_text(json.dumps(card), encoding="utf-8")
    return unescape(write_report(run).read_text(encoding="utf-8")).replace("\u202f", " ")


def test_filters_leaks_and_first_rows_are_on_the_page(renderer: Renderer, tmp_path: Path) -> None:
    rows = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(40)]
    held = [rows[3], {"prompt": "question 5", "completion": "other"}]
    rows += [rows[0], {"prompt": "x", "completion": "I cannot help with <b>that</b>."}]
    source = SourceOptions(
        path=str(write_jsonl(tmp_path / "a.jsonl", rows)),
        eval_path=str(write_jsonl(tmp_path / "b.jsonl", held)),
        on_leak=OnLeak.drop,
    )
    data = DataOptions(conversations=source, filters={"dedup": {}, "refusal": {}})
    html = page(tmp_path, prepare(RowKind.conversations, data, renderer, LengthOptions(64), 0).card)
    assert "filters, in this order: dedup dropped 1 of 44; refusal dropped 1 of 43" in html
    assert "training rows also evaluation rows: left out of training: 1" in html
    assert "training rows with the question of an evaluation row: left out of training: 1" in html
    assert "dropped: 1 duplicate, 1 leak, 1 question in eval, 1 refusal" in html
    assert "First rows of sft" in html and "<dd>a.jsonl:1</dd>" in html and str(tmp_path) not in html
    assert "answer 0" in html and "tokens: histogram" in html
    assert 'aria-label="failed"' not in html


def test_what_length_tells_of_pairs_is_on_the_page(renderer: Renderer, tmp_path: Path) -> None:
    rows = [{"prompt": f"q {n}", "chosen": "long answer", "rejected": "no"} for n in range(9)]
    rows.append({"prompt": "q 1", "chosen": "no", "rejected": "long answer"})
    data = DataOptions(preferences=SourceOptions(path=str(write_jsonl(tmp_path / "a.jsonl", rows)), eval_rows=0))
    html = page(tmp_path, prepare(RowKind.preferences, data, renderer, LengthOptions(64), 0).card)
    assert "the chosen reply is the longer one in 90.0 % of the pairs (mean 10.10 against 2.90 characters)" in html
    assert "2 contradictory" in html and "First rows of sft" in html and "<dt>rejected</dt>" in html
