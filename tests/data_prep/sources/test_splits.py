"""Several splits of a data set: the one meant for the rows that are asked for, or one line that names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.core.errors import UserError
from data_prep.options import DataOptions, SourceOptions
from data_prep.prepare.content_digest import data_digest
from data_prep.records.stream import Given, check_options, open_any, open_stream, source_for
from data_prep.sources.files import files_to_read
from data_prep.sources.splits import SplitWish, split_of_file
from data_prep.types import CONVERSATION, DOCUMENT, PREFERENCE, PROMPT, UNPAIRED, RowKind

ULTRAFEEDBACK = ["train_prefs", "train_sft", "test_prefs", "test_sft", "train_gen", "test_gen"]
ULTRACHAT = ["train_sft", "test_sft", "train_gen", "test_gen"]


@pytest.mark.parametrize(
    ("names", "kind", "expected"),
    [
        (ULTRAFEEDBACK, CONVERSATION, ["test_sft", "train_sft"]),
        (ULTRAFEEDBACK, PREFERENCE, ["test_prefs", "train_prefs"]),
        (ULTRAFEEDBACK, UNPAIRED, ["test_prefs", "train_prefs"]),
        (ULTRAFEEDBACK, PROMPT, ["test_gen", "train_gen"]),
        (["train_sft", "train_prefs", "test_sft"], PROMPT, ["test_sft", "train_sft"]),
        (["train_rm", "train_ppo", "train-sft", "valid1"], PREFERENCE, ["train_rm", "valid1"]),
        (["train_sft", "train_prefs", "test_prefs"], CONVERSATION, ["train_sft"]),
        (["train", "train_prefs", "test"], CONVERSATION, ["test", "train"]),
        (["train", "train_prefs", "test"], PREFERENCE, ["test", "train_prefs"]),
        (["train", "test_sft", "test_prefs"], CONVERSATION, ["test_sft", "train"]),
        (["test_sft", "test_gen"], CONVERSATION, ["test_sft"]),
        (["train_gen", "test_gen"], CONVERSATION, ["test_gen", "train_gen"]),
        (["train_1", "train_2", "more"], CONVERSATION, ["more", "train_1", "train_2"]),
        (["train_en", "train_de", "test_en"], CONVERSATION, ["test_en", "train_de", "train_en"]),
        (["train_sft", "train_gen", "names"], CONVERSATION, ["names", "train_sft"]),
    ],
)
def test_names_say_which_splits_of_a_folder_are_read(names: list[str], kind: RowKind, expected: list[str]) -> None:
    assert sorted(SplitWish(kind).of_files(names, "folder")) == expected


@pytest.mark.parametrize(
    ("names", "kind"), [(ULTRACHAT, PREFERENCE), (ULTRACHAT, DOCUMENT), (["train_prefs", "train_gen"], CONVERSATION)]
)
def test_several_of_which_none_is_meant_are_one_line(names: list[str], kind: RowKind) -> None:
    for choose in (SplitWish(kind, option="data.text.").of_files, SplitWish(kind, option="data.text.").of_hub):
        with pytest.raises(UserError) as caught:
            choose(names, "org/name")
        said = str(caught.value)
        assert "org/name" in said and "set data.text.split=NAME" in said and "\n" not in said
        assert all(name in said for name in names if name.startswith("train"))


@pytest.mark.parametrize(
    ("names", "kind", "expected"),
    [
        (ULTRAFEEDBACK, CONVERSATION, "train_sft"),
        (ULTRAFEEDBACK, PREFERENCE, "train_prefs"),
        (ULTRAFEEDBACK, PROMPT, "train_gen"),
        (["train", "train_2"], CONVERSATION, "train"),
        (["only"], PREFERENCE, "only"),
    ],
)
def test_one_split_of_a_hub_set_is_read(names: list[str], kind: RowKind, expected: str) -> None:
    assert SplitWish(kind).of_hub(names, "org/name") == expected


def test_an_evaluation_source_on_the_hub_is_its_split_that_evaluates() -> None:
    wish = Given(DataOptions(), SourceOptions(split="train_gen")).wish(CONVERSATION, "org/name")
    assert wish.of_hub(ULTRAFEEDBACK, "org/name") == "test_sft"
    assert wish.of_hub(["train"], "org/name") == "train"
    with pytest.raises(UserError, match=r"several splits that evaluate.* \(test, validation\).*save the one to read"):
        wish.of_hub(["train", "test", "validation"], "org/name")


def test_a_split_by_name_comes_with_what_evaluates_it() -> None:
    wish = SplitWish(CONVERSATION, "train_gen", "data.conversations.")
    assert wish.of_files(ULTRAFEEDBACK, "folder") == ["train_gen", "test_gen"]
    assert wish.of_hub(ULTRAFEEDBACK, "org/name") == "train_gen"
    assert SplitWish(name="train_en").of_files(["train_en", "train_de", "test", "more"], "f") == ["train_en", "test"]
    assert SplitWish(name="test_sft").of_files(ULTRAFEEDBACK, "folder") == ["test_sft"]
    wrong = SplitWish(None, "train_sf", "data.text.")
    for choose in (wrong.of_files, wrong.of_hub):
        with pytest.raises(UserError, match=r"data\.text\.split: unknown split 'train_sf' \(did you mean 'train_sft'"):
            choose(ULTRACHAT, "org/name")


def test_the_split_of_a_file() -> None:
    assert split_of_file("train_sft-00000-of-00003", "data") == "train_sft"
    assert split_of_file("data-00000-of-00003", "test_prefs") == "test_prefs"
    assert split_of_file("more", "data") == "more"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As the hub lays out its Parquet files: two splits of dialogues, one of pairs, one that evaluates."""
    talk = [{"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]} for n in (1, 2)]
    pair = {"prompt": "q3", "chosen": "good", "rejected": "bad"}
    rows: dict[str, list[dict[str, Any]]] = {
        "train_sft-00000-of-00002": talk[:1],
        "train_sft-00001-of-00002": talk[1:],
        "train_prefs-00000-of-00001": [pair],
        "test_sft-00000-of-00001": talk[:1],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return tmp_path


def test_each_kind_of_row_reads_its_own_split_of_a_folder(folder: Path) -> None:
    data = DataOptions(path=str(folder))
    dialogues = open_stream(source_for(data, CONVERSATION), CONVERSATION, 0)
    assert sorted(record.meta["split"] for record in dialogues) == ["eval", "train", "train"]
    assert dialogues.about()["evidence"].endswith("; split train_sft, not train_prefs")
    pairs = list(open_stream(source_for(data, PREFERENCE), PREFERENCE, 0))
    assert [pair.chosen for pair in pairs] == ["good"]
    assert len(list(open_any(source_for(data, PROMPT), (PROMPT,)))) == 3, "prompts are those of dialogues"


def test_the_digest_is_of_what_is_read(folder: Path) -> None:
    data = DataOptions(path=str(folder))
    before = {kind: data_digest(data, kind.name) for kind in (CONVERSATION, PREFERENCE)}
    (folder / "train_prefs-00000-of-00001.jsonl").write_text('{"prompt": "q", "chosen": "b", "rejected": "c"}\n')
    assert data_digest(data, "conversations") == before[CONVERSATION]
    assert data_digest(data, "preferences") != before[PREFERENCE]
    data.conversations.split = "train_sft"
    assert data_digest(data, "conversations") != before[CONVERSATION], "an option counts"


def test_a_folder_that_is_only_part_of_a_set_is_read_as_it_was(folder: Path) -> None:
    (folder / "train_prefs-00000-of-00001.jsonl").unlink()
    assert len(files_to_read(str(folder), SplitWish(PREFERENCE))) == 3
    assert [row for row in open_stream(Given(DataOptions(), SourceOptions(path=str(folder))), CONVERSATION, 0).rows]


def test_a_generator_has_no_split() -> None:
    source = SourceOptions(generator="smalltalk", split="train")
    with pytest.raises(UserError, match="is not read: a generator has no splits"):
        check_options(Given(DataOptions(), source, option="data.conversations."), CONVERSATION)
