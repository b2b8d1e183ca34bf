"""What saves a word: files as arguments, `last`, the newest runs first, and options found by what they do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from align.checkpoints.resolve import newest
from align.cli import dispatch as cli
from align.cli.own_files import with_files
from align.config.compose import compose
from data_prep.core.errors import UserError
from data_prep.options import DataOptions, SourceOptions
from data_prep.records.stream import source_for
from data_prep.types import CONVERSATION
from tests.run_folder import fake_run
from tests.tiny import write_jsonl
from tests.tiny_chain import read

TALK = [{"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": "a"}]} for n in range(9)]
PAIRS = [{"prompt": f"q {n}", "chosen": "good", "rejected": "bad"} for n in range(9)]
LABELLED = [{"prompt": f"q {n}", "completion": "a", "label": n % 2 == 0} for n in range(9)]
TEXT = [{"text": f"once upon a time {n}"} for n in range(9)]
ASKED = [{"prompt": f"q {n}"} for n in range(9)]
ODD = [{"question": f"q {n}", "better": "good", "worse": "bad"} for n in range(9)]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    named = {"talk": TALK, "pairs": PAIRS, "labelled": LABELLED, "text": TEXT, "asked": ASKED, "odd": ODD}
    for name, rows in named.items():
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    return {name: str(tmp_path / f"{name}.jsonl") for name in named}


@pytest.mark.parametrize(
    ("given", "pipeline"),
    [
        (["talk"], "sft"),
        (["talk", "pairs"], "rlhf"),
        (["pairs", "talk"], "rlhf"),
        (["pairs", "asked", "talk"], "rlhf"),
        (["talk", "labelled"], "sft_kto"),
        (["text"], "pretrain"),
    ],
)
def test_files_say_what_is_trained(files: dict[str, str], given: list[str], pipeline: str) -> None:
    words = with_files([*(files[name] for name in given), "seed=3"])
    config = compose(words)
    assert f"pipeline={pipeline}" in words and config.seed == 3 and config.pipeline == pipeline
    data = config.stages[0].data
    sources = {"talk": data.conversations, "pairs": data.preferences, "text": data.text, "asked": data.prompts}
    for name in given:
        source = sources.get(name, data.preferences)
        assert source.path == files[name]


def test_what_is_said_beside_files_goes_before_them(files: dict[str, str]) -> None:
    words = with_files([files["pairs"], "pipeline=dpo", "stages.dpo.init=base"])
    assert compose(words).pipeline == "dpo" and words.count("pipeline=dpo") == 1
    assert with_files(["adapter=vera", "~stages.sft"]) == ["adapter=vera", "~stages.sft"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["pairs"], "pairs alone"),
        (["asked"], "prompts alone"),
        (["labelled"], "labelled replies alone"),
        (["talk", "text"], "say which"),
        (["talk", "odd"], "data.preferences.columns={chosen: better, rejected: worse}"),
    ],
)
def test_files_that_do_not_say_it_are_refused(files: dict[str, str], given: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        with_files([files[name] for name in given])
    assert caught.value.hint is not None and said in caught.value.hint


def test_options_of_a_kind_say_what_the_rows_of_a_file_are(files: dict[str, str], tmp_path: Path) -> None:
    path = str(tmp_path / "asked.jsonl")
    write_jsonl(tmp_path / "asked.jsonl", [{"query": "Hi", "said": "yo", "answer": "no"}])
    with pytest.raises(UserError) as caught:
        with_files([path])
    assert "data.conversations.columns={completion: answer}, or" in str(caught.value.hint)
    words = with_files([path, "data.conversations.columns={completion: answer}"])
    assert words[:3] == ["data=files", f"data.conversations.path={path}", "pipeline=sft"]
    write_jsonl(tmp_path / "unknown.jsonl", [{"a1": "Hi", "b1": "yo"}])
    words = with_files([str(tmp_path / "unknown.jsonl"), "data.conversations.columns={prompt: a1, completion: b1}"])
    assert "pipeline=sft" in words
    both = with_files([files["talk"], f"data.preferences.path={files['pairs']}", "data.preferences.limit=2"])
    assert f"data.conversations.path={files['talk']}" in both
    with pytest.raises(UserError, match=f"has no conversations; data.conversations.path={path} reads its rows"):
        source_for(DataOptions(name="files", prompts=SourceOptions(path=path)), CONVERSATION)


@pytest.mark.parametrize(
    "word", ["data.conversations.path=x", "data.mix={a: {path: x}}", "data.conversations.mix.a.path=x"]
)
def test_a_file_beside_another_source_of_its_rows_is_refused(files: dict[str, str], word: str) -> None:
    with pytest.raises(UserError, match=f"talk.jsonl' and {word.partition('=')[0]} both give conversations"):
        with_files([files["talk"], word])


def test_two_files_of_a_kind_are_refused(files: dict[str, str], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "more.jsonl", TALK)
    with pytest.raises(UserError, match=r"two files of conversations: .*talk.jsonl and .*more.jsonl"):
        with_files([files["talk"], str(tmp_path / "more.jsonl")])


def test_last_is_the_newest_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for age, name in enumerate(["new", "old"]):
        run = fake_run(tmp_path / name)
        os.replace(run, tmp_path / f"{name}-run")
        os.utime(tmp_path / f"{name}-run" / "run.json", (1e9 - age, 1e9 - age))
    assert newest("last", str(tmp_path)) == str(tmp_path / "new-run")
    assert newest("last/ppo", str(tmp_path)) == str(tmp_path / "new-run" / "ppo")
    assert cli.main(["show", "last", f"out={tmp_path}"]) == 0
    assert cli.main(["ls", "runs", f"out={tmp_path}", "--json"]) == 0
    said = capsys.readouterr().out
    rows = json.loads(said[said.index("{\n") :])["runs"]
    assert [row["name"] for row in rows] == ["new-run", "old-run"]
    assert rows[0]["methods"] == ["lora"] and rows[0]["summary"] == "lora: Gold score rose from 0.42 to 0.81."
    record = read(tmp_path / "old-run" / "run.json")
    (tmp_path / "old-run" / "run.json").write_text(json.dumps({**record, "status": "failed", "error": "out of disk"}))
    assert cli.main(["ls", "runs", f"out={tmp_path}"]) == 0
    assert "lora: The run failed." in capsys.readouterr().out
    with pytest.raises(UserError, match="no run yet"):
        newest("last", str(tmp_path / "nothing"))
    (tmp_path / "last").mkdir()
    assert newest("last", str(tmp_path)) == "last", "a run of that name is meant"


def test_last_is_no_parent_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "pipeline=ppo", "stages.ppo.init=last/sft", "stages.ppo.reward=last/reward_model"]) == 2
    assert "'last/sft' names another run each day" in capsys.readouterr().out


def test_options_are_found_by_name_and_by_what_they_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["options", "penalty", "kl"]) == 0
    assert capsys.readouterr().out.startswith("stages.ppo.kl_coef")
    assert cli.main(["options", "lambda"]) == 0
    assert "(adapter=delta_lora)" in capsys.readouterr().out
    assert cli.main(["options", "epochs", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["options"]
    named = [row["option"] for row in found if row["option"].endswith(".epochs")]
    assert named[0] == "stages.NAME.epochs" and {"stages.sft.epochs"} < set(named), "where its default is another"
    assert "stages.kto.epochs" not in named and len(set(named)) == len(named)
    assert cli.main(["options", "kl_coeff"]) == 2
    assert "did you mean 'kl_coef'?" in capsys.readouterr().err


def test_the_schema_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "align recipe"
