"""`align eval TARGET tasks=[...]`: task files, every stage of the chain, paired intervals, contamination."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from align.cli.evaluate import in_full
from align.evaluation import own_tasks
from align.evaluation.options import TaskOptions
from align.evaluation.own_tasks import contents, require_no_code, rows_of, task_refusals
from data_prep.core.errors import UserError
from tests.tiny import write_jsonl

needs_library = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval comes with the extra [eval]")
CHOICE = """\
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: choices
doc_to_target: a
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 3}
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task file with its rows beside it; two of the six questions stand in the rows that train."""
    words = ["the", "owl", "lion", "band", "sand"]
    rows = [{"q": f"say {word} of the others", "choices": [" the", " owl"], "a": i % 2} for i, word in enumerate(words)]
    write_jsonl(tmp_path / "rows.jsonl", [*rows, {"q": "say the 0", "choices": [" the", " owl"], "a": 0}])
    (tmp_path / "mine.yaml").write_text(CHOICE)
    return tmp_path / "mine.yaml"


def test_options_of_the_evaluation_need_no_prefix() -> None:
    words = ["tasks=[arc_easy,mine.yaml]", "task_limit=5", "prompts=3", "seed=1", "data=files", "reward=x"]
    assert in_full(words) == [
        "stages.evaluate.tasks=[arc_easy,mine.yaml]",
        "stages.evaluate.task_limit=5",
        "stages.evaluate.prompts=3",
        "seed=1",
        "data=files",
        "reward=x",
    ]


def test_rows_lie_beside_the_task_file_and_both_decide_the_result(task: Path) -> None:
    options = TaskOptions(tasks=[str(task)])
    assert rows_of(task) == {"test": [(task.parent / "rows.jsonl").resolve()]}
    before = contents(options)
    write_jsonl(task.parent / "rows.jsonl", [{"q": "other"}])
    assert contents(options) != before and len(before) == 2
    (task.parent / "more.yaml").write_text("include: mine.yaml\ntask: more\n")
    assert len(contents(TaskOptions(tasks=[str(task.parent / "more.yaml")]))) == 3
    assert contents(TaskOptions(tasks=["arc_easy"])) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such task file"),
        ("a: [", "is no YAML"),
        ("a: 1", "is no task"),
        ("include: t.yaml", "includes itself"),
    ],
)
def test_what_is_no_task_file_is_said_before_anything_runs(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "t.yaml").write_text(text)
    problems = list(task_refusals(TaskOptions(tasks=[str(tmp_path / "t.yaml")]), "stages.evaluate"))
    assert any(said in str(problem) for problem in problems)


def test_without_the_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_tasks, "find_spec", lambda name: None)
    (problem,) = task_refusals(TaskOptions(tasks=["arc_easy"]), "stages.evaluate")
    assert "pip install -e '.[eval]'" in str(problem) and problem.field == "stages.evaluate.tasks"
    assert not list(task_refusals(TaskOptions(), "stages.evaluate"))


def test_functions_of_task_files_need_leave(task: Path) -> None:
    task.write_text(CHOICE + "process_docs: !function mine.docs\n")
    options = TaskOptions(tasks=[str(task)])
    with pytest.raises(UserError, match="allow_code=true"):
        require_no_code(options, allow_code=False)
    require_no_code(options, allow_code=True)


def test_functions_without_leave_are_refused_before_there_is_a_run(task: Path, tmp_path: Path, capsys: Any) -> None:
    from align.cli.dispatch import main
    from tests.tiny_chain import finished

    task.write_text(CHOICE + "process_docs: !function mine.docs\n")
    out = tmp_path / "runs"
    assert main(["eval", f"{finished()}/sft", f"out={out}", f"tasks=[{task}]"]) == 2
    assert "allow_code=true" in capsys.readouterr().err and not out.exists()


@needs_library
def test_every_stage_is_measured_and_compared_document_by_document(task: Path, tmp_path: Path, capsys: Any) -> None:
    from align.cli.dispatch import main
    from tests.tiny_chain import made

    run = made("sft", f"out={tmp_path}", "name=n", out=tmp_path)
    assert main(["eval", f"{run}/sft", f"out={tmp_path}", f"tasks=[{task}]", "prompts=4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    found = result["tasks"]["mine"]
    assert (found["n"], found["version"], found["shots"], found["chat"]) == (6, 3, 0, False)
    acc = found["metrics"]["acc"]
    assert list(acc["stages"]) == ["base", "sft"] and all(0 <= value <= 1 for value in acc["stages"].values())
    change = acc["changes"]["base"]
    assert change["value"] == pytest.approx(acc["stages"]["sft"] - acc["stages"]["base"])
    assert change["low"] <= change["value"] <= change["high"] and change["n"] == 6
    assert found["contamination"]["found"] == 1 and found["contamination"]["first"][0]["document"] == 5
    assert any("mine" in sentence for sentence in result["verdict"]["sentences"])


@needs_library
@pytest.mark.parametrize(
    ("problem", "said"),
    [(ConnectionError("Couldn't reach 'x' on the Hub"), "from the network"), (ValueError("odd"), "cannot be opened")],
)
def test_documents_that_cannot_be_read_are_one_line(
    task: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception, said: str
) -> None:
    import datasets

    from align.evaluation.tasks import Tasks

    def load(*args: Any, **more: Any) -> None:
        raise problem

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=said):
        Tasks(TaskOptions(tasks=[str(task)]), allow_code=False)


def test_changes_are_paired_and_the_verdict_knows_what_is_better() -> None:
    from align.evaluation.tasks import _change

    after, before = {i: float(i % 4 != 0) for i in range(40)}, {i: float(i % 2) for i in range(41)}
    change = _change(after, before, rises=True)
    assert change is not None and change["n"] == 40 and change["verdict"] == "better"
    assert change["value"] == pytest.approx(0.25)
    assert change["high"] - change["value"] == pytest.approx(1.959964 * (0.25 * 0.75 / 39) ** 0.5)  # by hand
    falls = _change(after, before, rises=False)
    assert falls is not None and falls["verdict"] == "worse"
    same = _change(before, before, rises=True)
    assert same is not None and same["verdict"] == "unclear"
    assert _change({0: 1.0}, {0: 0.0}, rises=True) is None


def test_numbers_that_are_not_finite_have_no_place_in_a_result() -> None:
    from align.evaluation.tasks import _each, _values

    row = {"alias": "t", "ppl,none": float("inf"), "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 1}
    assert _values(row) == {"ppl": None, "acc": 0.5, "em,strict": 1.0}
    sample = {"doc_id": 3, "filter": "none", "metrics": ["acc", "ppl", "bits"], "acc": True, "ppl": (1.0, 2)}
    assert _each([{**sample, "bits": float("nan")}]) == {"acc": {3: 1.0}}
