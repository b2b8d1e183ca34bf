"""Numbers in the tables of a report are those of the run's files."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from align.report.formatting import duration, fixed, number, percent, size
from align.report.page import write_report
from tests.run_folder import BINS, QUESTIONS, REPLIES, fake_run


def page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


NUMBER = re.compile(
    "[0-9a-f]{8}|[\N{MINUS SIGN}+]?[0-9][0-9,]*(?:[.][0-9]+)?(?:e\N{MINUS SIGN}?[0-9]+)?"
    "(?:\u202f%| GiB| MiB| KiB| min| s)?"
)


class Tables(HTMLParser):
    """The text of every cell of every table, and of every <dd>."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.rows: list[list[str]] = []
        self._open = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th", "dd"):
            self._open += 1
            self.cells.append("")
        if tag == "svg":
            self._open -= 1  # drawings have words of their own

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "dd"):
            self._open -= 1
            if tag != "dd":
                self.rows[-1].append(self.cells[-1].strip())
        if tag == "svg":
            self._open += 1

    def handle_data(self, data: str) -> None:
        if self._open > 0:
            self.cells[-1] += data


def tables(html: str) -> Tables:
    parser = Tables()
    parser.feed(html)
    return parser


def leaves(value: Any) -> list[float]:
    """Every number in a JSON value."""
    if isinstance(value, dict | list):
        return [x for inner in (value.values() if isinstance(value, dict) else value) for x in leaves(inner)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_every_number_in_a_table_is_in_the_files(tmp_path: Path) -> None:
    """Numbers shown are numbers of the files as the page writes them, or one of five sums and counts of them."""
    run = fake_run(tmp_path)
    shown = tables(page(run)).cells
    held = [x for path in run.rglob("*.json") for x in leaves(json.loads(path.read_text()))]
    for path in run.rglob("*.jsonl"):
        held += [x for line in path.read_text().splitlines() for x in leaves(json.loads(line))]
    stages = json.loads((run / "run.json").read_text())["stages"]
    held += [stage["seconds"] - sum(stage["phases"].values()) for stage in stages]  # what no phase counts
    held += [12 + 31, 44, 0]  # rows dropped for any reason
    held += [3, 1, 2]  # outputs of a probe, files, parents
    written = {word(x) for x in held for word in (number, fixed, percent, size, duration)}
    written |= {"2.60 times", *(stage["digest"][:8] for stage in stages), "95\u202f%", "feedbeef"}
    written |= {"A Processor", "x86_64", *json.loads((run / "run.json").read_text())["versions"].values()}
    known = {token for text in written for token in NUMBER.findall(text)}
    cells = [cell for cell in shown if not any(text[:8] in cell for text in (*REPLIES.values(), *QUESTIONS))]
    found = [(token, cell) for cell in cells for token in NUMBER.findall(cell)]
    assert len(found) > 150
    assert [(token, cell) for token, cell in found if token not in known] == []


def test_the_scores_are_those_of_the_evaluation(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    rows = tables(page(run)).rows
    result = json.loads((run / "evaluate" / "result.json").read_text())
    head = next(row for row in rows if row[:2] == ["stage", "gold"])
    for name, held in result["stages"].items():
        row = next(row for row in rows if row[0] == name and len(row) == len(head))
        gold = held["gold"]
        assert row[1] == f"{fixed(gold['score'])} ± {fixed(gold['se'])}"
        assert (
            row[2:5]
            == [fixed(gold[part]) for part in ("topic", "persona", "wellformed")]
            == [row[head.index(x)] for x in ("topic", "persona", "wellformed")]
        )
        assert row[head.index("reward")] == fixed(held["reward"]) and row[head.index("loss")] == number(held["loss"])
    for bin_ in BINS:
        assert [percent(bin_[k]) for k in ("confidence", "accuracy")] == next(
            r for r in rows if r[0].startswith(percent(bin_["from"]))
        )[2:]
