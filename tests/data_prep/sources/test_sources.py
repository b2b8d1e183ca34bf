"""Reading files: strict, with file, row and field in every complaint."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from data_prep.core.errors import UserError
from data_prep.sources import files as sources
from data_prep.sources.files import Row, digest_path, read_path

ROWS = [{"prompt": "hi", "completion": "yo"}, {"prompt": "é\n2", "completion": 'x,"y"\tz'}]


def read(path: Path | str, root: str | None = None) -> list[Any]:
    return [row.data if isinstance(row, Row) else row for row in read_path(str(path), root)]


def jsonl(rows: list[Any] = ROWS) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


CSV = b'prompt,completion\nhi,yo\n"\xc3\xa9\n2","x,""y""\tz"\n'
KINDS = {
    "a.jsonl": jsonl(),
    "a.ndjson": jsonl(),
    "a.json": json.dumps(ROWS, indent=2).encode(),
    "lines.json": jsonl(),
    "a.csv": CSV,
    "a.CSV": CSV,
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("how", ["plain", "gz", "bom", "crlf", "no last newline", "blank lines"])
def test_every_kind_reads_the_same_rows(tmp_path: Path, name: str, how: str) -> None:
    content = KINDS[name]
    if how == "gz":
        name, content = name + ".gz", gzip.compress(content)
    elif how == "bom":
        content = b"\xef\xbb\xbf" + content
    elif how == "crlf" and not name.lower().endswith("csv"):
        content = content.replace(b"\n", b"\r\n")
    elif how == "no last newline":
        content = content.rstrip(b"\n")
    elif how == "blank lines" and not name.lower().endswith("csv"):
        content = b"\n  \n" + content.replace(b"\n", b"\n\n") + b"\n"
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == ROWS


def test_csv_with_crlf_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\r\na,b\r\n1,2\r\n\r\n3,4")
    assert read(tmp_path / "a.csv") == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]


def test_tsv_has_no_quoting(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b'Question\tAnswer\r\nsay "hi"\t"oh\r\n')
    assert read(tmp_path / "a.tsv") == [{"Question": 'say "hi"', "Answer": '"oh'}]


def test_text_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("one\n\n two é".encode()))
    assert read(tmp_path / "a.txt.gz") == [{"text": "one"}, {"text": " two é"}]


def test_parquet(tmp_path: Path) -> None:
    nested = [{"messages": [{"role": "user", "content": "a"}], "n": None}]
    parquet(tmp_path / "a.parquet", nested)
    assert read(tmp_path / "a.parquet") == nested


def test_rows_count_from_one_by_line_or_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    (tmp_path / "a.csv").write_text('a\n"x\ny"\nz\n')
    assert [row.row for row in read_path(str(tmp_path / "a.jsonl"))] == [1, 3]
    assert [row.row for row in read_path(str(tmp_path / "a.csv"))] == [1, 2]


def test_folder_and_glob_in_order(tmp_path: Path) -> None:
    for number, name in enumerate(["b.jsonl", "a.jsonl", "deep/c.jsonl", "notes.md", ".hidden.jsonl"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"n": number}) + "\n")
    assert [row["n"] for row in read(tmp_path)] == [1, 0, 2]
    assert [row["n"] for row in read("*.jsonl", root=str(tmp_path))] == [1, 0]


def test_root_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("a.jsonl", root=str(tmp_path)) == read("~/a.jsonl") == ROWS


BAD_ROWS = {
    "broken.jsonl": (b'{"a": 1}\n{"a": \n', 2, "invalid JSON"),
    "cut.jsonl": (b'{"a": 1}\n{"a": "x', 2, "invalid JSON"),
    "list.jsonl": (b'{"a": 1}\n3\n', 2, "got a number 3; expected an object"),
    "null.json": (b'[{"a": 1}, null]', 2, "got null"),
    "nan.jsonl": (b'{"a": NaN}\n', 1, "NaN is not JSON"),
    "twice.jsonl": (b'{"a": 1, "a": 2}\n', 1, "'a' stands twice"),
    "utf8.jsonl": (b'{"a": 1}\n{"a": "\xff"}\n', 2, "invalid UTF-8 (got byte 0xff"),
    "utf8.json": (b'[{"a": 1}, {"a": "\xff"}, {"a": 3}]', 2, "invalid UTF-8 byte 0xff"),
    "utf8.txt": (b"fine\nb\xe9d\n", 2, "invalid UTF-8"),
    "utf8.csv": (b"a\nfine\nb\xe9d\n", 2, "invalid UTF-8"),
    "short.csv": (b"a,b\n1,2\n3\n", 2, "short row (got 1 fields; expected 2: a, b)"),
    "long.csv": (b"a,b\n1,2,3\n", 1, "long row (got 3 fields"),
    "short.tsv": (b"a\tb\n1\n", 1, "short row"),
    "quote.csv": (b'a\nfine\n"open\n', 2, "broken quoting"),
    "deep.jsonl": (b"{" + b'"a":[' * 100_000 + b"\n", 1, "invalid JSON"),
    "digits.jsonl": (b'{"a": ' + b"9" * 5000 + b"}\n", 1, "invalid JSON"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named(tmp_path: Path, name: str) -> None:
    content, number, words = BAD_ROWS[name]
    path = tmp_path / name
    path.write_bytes(content)
    try:
        (problem,) = [row for row in read_path(str(path)) if isinstance(row, UserError)]
    except UserError as raised:
        problem = raised
    assert str(problem).startswith(f"{path}:{number}:") and words in str(problem)
    assert "\n" not in str(problem) and len(str(problem)) < 400 + len(str(path))


def test_good_rows_around_bad_ones_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\nx\n{"a": 2}\n\xff\n{"a": 3}')
    rows = read(tmp_path / "a.jsonl")
    assert [row["a"] for row in rows if isinstance(row, dict)] == [1, 2, 3] and len(rows) == 5


BAD_FILES = {
    "empty.jsonl": (b"", "is empty"),
    "blank.jsonl": (b"\n \n", "is empty"),
    "empty.json": (b"[]", "is empty"),
    "empty.csv": (b"\xef\xbb\xbf", "is empty"),
    "header.csv": (b"a,b\n", "a header without rows"),
    "empty.jsonl.gz": (gzip.compress(b""), "is empty"),
    "cut.jsonl.gz": (gzip.compress(b'{"a": 1}\n' * 100)[:-9], "not a whole gzip file"),
    "plain.jsonl.gz": (b'{"a": 1}\n', "not a whole gzip file"),
    "broken.json": (b'[{"a": 1},\n', "invalid JSON"),
    "number.json": (b"3", "holds a number (got 3; expected an array of objects)"),
    "array.jsonl": (b'[{"a": 1}]', "call it .json"),
    "pretty.jsonl": (b'{\n "a": 1\n}\n{\n "a": 2\n}\n', "call it .json"),
    "commas.tsv": (b"a,b\n1,2\n", "separated by commas"),
    "tar.jsonl": (b"x.jsonl" + b"\0" * 250 + b"ustar", "is a tar archive"),
    "tar.jsonl.gz": (gzip.compress(b"x.jsonl" + b"\0" * 250 + b"ustar"), "is a tar archive"),
    "a.tar.gz": (b"", "unpack it"),
    "columns.json": (b'{"a": ["x", "y"], "b": [1, 2]}', "holds columns"),
    "pandas.json": (b'{"a": {"0": "x", "1": "y"}, "b": {"0": 1, "1": 2}}', "orient='records'"),
    "index.json": (b'{"0": {"a": "x", "b": 1}, "1": {"a": "y", "b": 2}}', "holds columns"),
    "split.json": (b'{"columns": ["a"], "index": [0], "data": [["x"]]}', "holds columns"),
    "utf16.jsonl": ('{"a": 1}'.encode("utf-16"), "UTF-16"),
    "twice.csv": (b"a,a\n1,2\n", "'a' twice"),
    "rows.xlsx": (b"PK", "unknown kind of file"),
    "a.parquet": (b"PAR1nonsense", "is not a Parquet file"),
    "a.pkl": (b"\x80\x04.", "unknown kind of file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_one_line(tmp_path: Path, name: str) -> None:
    content, words = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name)) and words in str(caught.value)
    assert "\n" not in str(caught.value)


ONE_ROW = {
    "lists": {"messages": [{"role": "user"}], "tools": [{"type": "function"}]},
    "objects": {"chosen": {"role": "assistant"}, "rejected": {"role": "assistant"}},
    "one list": {"dialog": ["a", "b"]},
    "lists of two lengths": {"dialog": ["a", "b"], "act": [1]},
}


@pytest.mark.parametrize("name", ONE_ROW)
def test_one_object_in_a_file_is_a_row(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ONE_ROW[name]))
    assert read(tmp_path / "a.json") == [ONE_ROW[name]]


def test_a_folder_that_cannot_be_looked_into_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    closed = tmp_path / "closed"
    closed.mkdir()
    look = os.scandir

    def scandir(path: str) -> Any:
        if str(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    assert str(caught.value) == f"{closed}: cannot be read: Permission denied"


def test_an_address_is_no_path(tmp_path: Path) -> None:
    for address in ("https://example.org/a.jsonl", "s3://bucket/a.jsonl", "hf://datasets/org/name"):
        with pytest.raises(UserError, match="is an address, and no file is fetched from one; download it"):
            read(address)


def test_damaged_files_are_read_or_refused_but_never_crash(tmp_path: Path) -> None:
    """Random cuts, flips and insertions in every kind of file: rows or one-line errors, nothing else."""
    draw = random.Random(3)
    parquet(tmp_path / "a.parquet", ROWS)
    whole = {**KINDS, "a.tsv": b"a\tb\n1\t2\n", "a.txt": b"x\ny\n", "a.parquet": (tmp_path / "a.parquet").read_bytes()}
    for number in range(600):
        name = draw.choice(sorted(whole))
        content = bytearray(whole[name])
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(content) + 1)
            piece = draw.choice([b"\xff", b'"', b"{", b"\n", b"\x00", b",", b"\xf0\x9f", b"null", b"\r", b"]"])
            content[place : place + draw.choice([0, 0, 1, 5])] = piece
        path = tmp_path / f"{number}_{name}"
        path.write_bytes(gzip.compress(bytes(content)) if number % 5 == 0 else bytes(content))
        if number % 5 == 0:
            path = path.rename(f"{path}.gz")
        try:
            rows = list(read_path(str(path)))
        except UserError as problem:
            rows = [problem]
        assert rows and all(isinstance(row, Row) or "\n" not in str(row) for row in rows)


def test_missing_files_offer_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(jsonl())
    with pytest.raises(UserError, match=r"did you mean '.*train\.jsonl'"):
        read(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match="does not exist either"):
        read(tmp_path / "nowhere" / "train.jsonl")
    with pytest.raises(UserError, match="no data file matches"):
        read(tmp_path / "*.csv")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="no data file in this folder"):
        read(tmp_path / "folder")


def test_hub_ids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    def unreachable(name: str, **_: Any) -> Any:
        raise ConnectionError("no route\nto host")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError) as caught:
        read("org/name")
    said = "cannot reach the hub for 'org/name': no route to host (save it as JSONL and give the path)"
    assert str(caught.value) == said
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train": ROWS, "test": []})
    assert read("org/name") == ROWS
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"a": ROWS, "b": []})
    with pytest.raises(UserError, match="several splits"):
        read("org/name")
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"test_sft": [], "train_sft": ROWS})
    assert read("org/name") == ROWS
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train_sft": ROWS, "train_gen": ROWS})
    with pytest.raises(UserError, match=r"several train splits \(train_sft, train_gen\)"):
        read("org/name")


def test_hub_sets_that_come_as_code_or_need_a_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    def failing(problem: Exception) -> Any:
        def load(name: str, *config: str) -> Any:
            if config == ("main",):
                return {"train": ROWS}
            raise problem

        return load

    monkeypatch.chdir(tmp_path)
    script = RuntimeError("Dataset scripts are no longer supported, but found name.py")
    monkeypatch.setattr(datasets, "load_dataset", failing(script))
    with pytest.raises(UserError, match="comes as a script, which is never run") as caught:
        read("org/name")
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    config = ValueError("Config name is missing.\nPlease pick one among: ['main', 'socratic']")
    monkeypatch.setattr(datasets, "load_dataset", failing(config))
    with pytest.raises(UserError, match="expected org/name:CONFIG, CONFIG one of main, socratic"):
        read("org/name")
    assert read("org/name:main") == ROWS


def test_a_hub_set_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real library, offline and with an empty cache."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="cannot reach the hub for 'no-such-org/no-such-set'") as caught:
        read("no-such-org/no-such-set")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("path", ["org/name.jsonl", "a/b/c", "./org", "here/name", "name"])
def test_paths_that_are_no_hub_ids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert not sources.is_hub_id(path)
    with pytest.raises(UserError, match="no such file"):
        read(path)


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    for folder in ("x", "y"):
        (tmp_path / folder / "a.jsonl").write_bytes(jsonl())
    assert digest_path("x/a.jsonl", str(tmp_path)) == digest_path(str(tmp_path / "y/a.jsonl"))
    assert digest_path(str(tmp_path / "x")) == digest_path(str(tmp_path / "y"))
    before = digest_path(str(tmp_path / "x"))
    (tmp_path / "x" / "a.jsonl").write_bytes(jsonl(ROWS[:1]))
    assert digest_path(str(tmp_path / "x")) != before


def test_code_beside_the_data_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    (tmp_path / "a.py").write_text("raise SystemExit('ran')")
    assert read(tmp_path) == ROWS
