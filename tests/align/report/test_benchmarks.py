"""What `tasks`, `judge` and `pairs` of an evaluation found stands in tables of the report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from align.report.page import write_report
from tests.run_folder import fake_run, write

CHANGES = {
    "base": {"value": 0.25, "low": 0.125, "high": 0.375, "n": 40, "verdict": "better"},
    "sft": {"value": -0.0625, "low": -0.125, "high": -0.015, "n": 40, "verdict": "worse"},
}
STAGES = {"base": 0.5, "sft": 0.8125, "ppo": 0.75}
TASKS = {
    "mine": {
        "n": 40,
        "shots": 2,
        "chat": True,
        "contamination": {"documents": 40, "found": 3},
        "metrics": {
            "acc": {"higher_is_better": True, "stages": STAGES, "changes": CHANGES},
            "ppl": {"higher_is_better": False, "stages": {**STAGES, "base": None}, "changes": {}},
        },
    },
    "all": {"group": ["mine", "other"], "metrics": {"acc": {"stages": STAGES, "changes": {}}}},
}
COMPARED = {"value": 0.625, "low": 0.5, "high": 0.75, "n": 64, "ties": 3, "disagree": 5, "unread": 1}
ORDERED = {"accuracy": 0.75, "low": 0.6, "high": 0.85, "n": 48, "margin": 1.5}

JUDGED = {**COMPARED, "judge": "big", "against": "sft", "earlier": {"base": {**COMPARED, "value": 0.875}}}
PAIRS = {**ORDERED, "too_long": 2, "sections": {"Chat": ORDERED}, "subsets": {"mt-bench-easy": ORDERED}}


def rows_of(run: Path, **found: Any) -> list[str]:
    """The rows of the benchmarks' tables as words, with more in result.json."""
    path = run / "evaluate" / "result.json"
    write(path, {**json.loads(path.read_text(encoding="utf-8")), **found})
    html = write_report(run).read_text(encoding="utf-8")
    section = next((part for part in html.split("<section") if "<h2>Benchmarks" in part), "")
    rows = re.findall(r"<tr>(.*?)</tr>|(<h3>.*?</h3>)", section, flags=re.DOTALL)
    return [" ".join(re.sub("<[^>]+>", " ", row or head).replace("&#8239;", " ").split()) for row, head in rows]


def test_tasks_have_the_values_of_all_stages_and_the_change_over_each(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    assert rows_of(run) == []
    assert rows_of(run, tasks=TASKS) == [
        "task base sft ppo over base over sft",
        "mine acc 40 documents, 2 examples before each, in the chat template, 3 stand in the data "
        "0.500 0.812 0.750 +0.25 +0.12 to +0.38 \u22120.06 \u22120.12 to \u22120.01",
        "mine ppl, less is better \u2013 0.812 0.750",
        "all acc of mine, other 0.500 0.812 0.750",
    ]


def test_a_judge_and_pairs_have_tables_too(tmp_path: Path) -> None:
    found = rows_of(fake_run(tmp_path), judged=JUDGED, pairs=PAIRS)
    assert found[0].startswith("What big prefers") and found[1].startswith("ppo against prompts preferred")
    assert found[2] == "sft 64 62.5 % 50.0 % to 75.0 % 3 5 1"
    assert found[3].startswith("base 64 87.5 %")
    assert "75.0 % of 48 rightly; 2 too long" in found[4] and found[6].startswith("Chat 48 75.0 %")
    assert found[8].startswith("mt-bench-easy 48")
