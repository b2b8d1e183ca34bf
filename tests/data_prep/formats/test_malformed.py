"""Malformed files in every container: each loads with its content as written, or is refused in one line, exit 2."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep.core.errors import UserError
from data_prep.formats.base import FORMATS
from data_prep.options import DataOptions, LengthOptions, OnBadRow, SourceOptions
from data_prep.prepare.prepare import prepare
from data_prep.records.stream import source_for
from data_prep.rendering.renderer import Renderer
from data_prep.sources.files import read_path
from data_prep.sources.rows import Row, Skip
from data_prep.types import CONVERSATION, DOCUMENT, PREFERENCE, PROMPT, UNPAIRED, RowKind
from tests.data_prep.formats.malformed_rows import BAD, Bad
from tests.records import read_records
from tests.tiny import tiny_tokenizer

LETTERS = {"l": "jsonl", "j": "json", "c": "csv", "p": "parquet"}


# ----------------------------------------------------------------------------------------------------- writing files
def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_json(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=1).encode()


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    for row in rows:
        writer.writerow({k: v if isinstance(v, str | float) else json.dumps(v) for k, v in row.items()})
    return out.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "jsonl": as_jsonl,
    "json": as_json,
    "csv": as_csv,
    "parquet": as_parquet,
}


def data_of(path: Path, kind: str, **source: Any) -> DataOptions:
    name = {CONVERSATION: "conversations", PREFERENCE: "preferences", UNPAIRED: "preferences"}[kind]
    return DataOptions(**{name: SourceOptions(path=str(path), **source)})


def checked_line(problem: UserError, path: Path, row: int | None) -> str:
    """The one line of a refusal, after checking its form."""
    line = str(problem)
    place = f"{path}:{row}:" if row else f"{path}:"
    assert line.startswith(place) and "\n" not in line and len(line) < 700 + len(str(path)), line
    assert problem.exit_code == 2
    assert row is None or re.search(r"\(got .+; expected .+\)", line, re.DOTALL), line
    return line


# -------------------------------------------------------------------------------------------------------------- rows
ROW_CASES = [
    pytest.param(bad, container, id=f"{container}-{bad.name}")
    for letter, container in LETTERS.items()
    for bad in BAD
    if not bad.only or letter in bad.only
]


@pytest.mark.parametrize(("bad", "container"), ROW_CASES)
def test_a_bad_row_is_named_and_the_others_are_read(tmp_path: Path, bad: Bad, container: str) -> None:
    path = tmp_path / f"rows.{container}"
    path.write_bytes(WRITERS[container]([bad.good, bad.row, bad.good]))
    records, tally, about = read_records(source_for(data_of(path, bad.kind), bad.kind), bad.kind, 0)
    (problem,) = tally.problems
    line = checked_line(problem, path, 2)
    assert line.startswith(f"{path}:2:{bad.field}: ") and bad.words in line, line
    assert tally.bad_rows == 1 and about["source_rows"] == 3
    ids = {record.id.split("#")[0].removeprefix(f"{path}:") for record in records}
    assert ids == {"1", "3"}
    with pytest.raises(UserError) as caught:
        tally.check_bad_rows(OnBadRow.refuse)
    assert checked_line(caught.value, path, 2)
    tally.check_bad_rows(OnBadRow.drop)


# ------------------------------------------------------------------------------------------------------------- files
GOOD = b'{"prompt": "q", "completion": "a"}\n'
HEAD = b"prompt,completion\n"
DEEP = b"[" * 100_000
BIG = "x" * 10_000_000
FILES: dict[str, tuple[bytes, int | None, str]] = {
    # name: (content, row that is named, words); JSON lines
    "cut.jsonl": (GOOD + b'{"prompt": "q", "comp', 2, "invalid JSON"),
    "open.jsonl": (GOOD + b'{"prompt": "q"\n', 2, "invalid JSON"),
    "words.jsonl": (GOOD + b"hello\n", 2, "invalid JSON"),
    "number.jsonl": (GOOD + b"3\n", 2, "got a number 3; expected an object"),
    "text.jsonl": (GOOD + b'"a"\n', 2, "got text a; expected an object"),
    "list.jsonl": (GOOD + b"[1]\n", 2, "got a list [1]; expected an object"),
    "null.jsonl": (GOOD + b"null\n", 2, "got null; expected an object"),
    "nan.jsonl": (GOOD + b'{"prompt": NaN}\n', 2, "NaN is not JSON"),
    "infinity.jsonl": (GOOD + b'{"prompt": -Infinity}\n', 2, "-Infinity is not JSON"),
    "twice.jsonl": (GOOD + b'{"prompt": "a", "prompt": "b"}\n', 2, "'prompt' stands twice"),
    "inside_twice.jsonl": (GOOD + b'{"prompt": {"a": 1, "a": 2}}\n', 2, "'a' stands twice"),
    "utf8.jsonl": (GOOD + b'{"prompt": "\xff"}\n', 2, "got byte 0xff"),
    "latin1.jsonl": (GOOD + '{"prompt": "\xe9t\xe9"}\n'.encode("latin-1"), 2, "got byte 0xe9"),
    "utf16.jsonl": ('{"prompt": "q"}\n'.encode("utf-16"), None, "is UTF-16"),
    "array.jsonl": (b"[" + GOOD + b"]", None, "call it .json"),
    "deep.jsonl": (GOOD + b'{"a": ' + DEEP + b"\n", 2, "nested too deeply"),
    "digits.jsonl": (GOOD + b'{"a": ' + b"9" * 5000 + b"}\n", 2, "invalid JSON"),
    "tab.jsonl": (GOOD + b'{"prompt": "a\tb"}\n', 2, "control character"),
    "comma.jsonl": (GOOD + b'{"prompt": "a",}\n', 2, "invalid JSON"),
    "quotes.jsonl": (GOOD + b"{'prompt': 'a'}\n", 2, "invalid JSON"),
    "comment.jsonl": (GOOD + b"// a comment\n", 2, "invalid JSON"),
    "two.jsonl": (GOOD + GOOD.strip() + GOOD, 2, "Extra data"),
    "bom_inside.jsonl": (GOOD + b"\xef\xbb\xbf" + GOOD, 2, "invalid JSON"),
    "nul.jsonl": (GOOD + b"\x00\x00\n", 2, "invalid JSON"),
    "escape.jsonl": (GOOD + b'{"prompt": "\\x"}\n', 2, "invalid JSON"),
    "csv_inside.jsonl": (b"prompt,completion\n", 1, "invalid JSON"),
    "empty.jsonl": (b"", None, "is empty"),
    "blank.jsonl": (b"\r\n \n\t\n", None, "is empty"),
    "bom.jsonl": (b"\xef\xbb\xbf", None, "is empty"),
    # JSON
    "cut.json": (b'[{"prompt": "q"}, {"prom', 2, "the rest cannot be read"),
    "no_comma.json": (b'[{"a": 1} {"a": 2}]', 2, "Expecting ',' delimiter"),
    "unclosed.json": (b'[{"a": 1}', 1, "Expecting ',' delimiter"),
    "last_comma.json": (b'[{"a": 1},]', 2, "the rest cannot be read"),
    "extra.json": (b'[{"a": 1}] []', 2, "Extra data"),
    "two_arrays.json": (b'[{"a": 1}]\n[{"a": 2}]', 2, "Extra data"),
    "words.json": (b"hello", 1, "the rest cannot be read"),
    "number.json": (b"3", None, "holds a number"),
    "string.json": (b'"a"', None, "holds text"),
    "null.json": (b"null", None, "holds null"),
    "nan.json": (b'[{"a": 1}, {"a": NaN}, {"a": 1}]', 2, "NaN is not JSON"),
    "infinity.json": (b'[{"a": 1}, {"a": Infinity}]', 2, "Infinity is not JSON"),
    "twice.json": (b'[{"a": 1}, {"a": 1, "a": 2}]', 2, "'a' stands twice"),
    "numbers.json": (b'[{"a": 1}, 2]', 2, "got a number 2; expected an object"),
    "null_row.json": (b'[{"a": 1}, null]', 2, "got null"),
    "list_row.json": (b'[{"a": 1}, [1]]', 2, "got a list"),
    "utf8.json": (b'[{"a": 1}, {"a": "\xff"}]', 2, "invalid UTF-8 byte 0xff"),
    "utf8_key.json": (b'[{"a": 1}, {"\xe9": "x"}]', 2, "invalid UTF-8 byte 0xe9"),
    "utf16.json": ('[{"a": 1}]'.encode("utf-16-be").join([b"\xfe\xff", b""]), None, "is UTF-16"),
    "deep.json": (b'[{"a": 1}, {"a": ' + DEEP + b"]", 2, "nested too deeply"),
    "digits.json": (b'[{"a": 1}, {"a": ' + b"9" * 5000 + b"}]", 2, "invalid JSON"),
    "tab.json": (b'[{"a": "x\ty"}]', 1, "control character"),
    "quotes.json": (b"[{'a': 1}]", 1, "the rest cannot be read"),
    "comment.json": (b'[{"a": 1} /* x */]', 2, "Expecting ',' delimiter"),
    "object_cut.json": (b'{"a": 1,\n "b"', 1, "the rest cannot be read"),
    "objects_cut.json": (b'{\n"a": 1}\n{"a"\n', 2, "the rest cannot be read"),
    "array_empty.json": (b" [ ] ", None, "is empty (an array without rows)"),
    "empty.json": (b"", None, "is empty"),
    "blank.json": (b" \n", None, "is empty"),
    # CSV
    "short.csv": (HEAD + b"q,a\nq\n", 2, "short row (got 1 fields; expected 2"),
    "long.csv": (HEAD + b"q,a\nq,a,b\n", 2, "long row (got 3 fields"),
    "comma_inside.csv": (HEAD + b"q,a\nwell, no,a\n", 2, "long row"),
    "open_quote.csv": (HEAD + b'q,a\n"q,a\n', 2, "broken quoting"),
    "quote_inside.csv": (HEAD + b'q,a\n"q"x,a\n', 2, "broken quoting"),
    "utf8.csv": (HEAD + b"q,a\nq,\xff\nq,a\n", 2, "completion: invalid UTF-8 (got byte 0xff"),
    "latin1.csv": (HEAD + "q,a\n\xe9,a\n".encode("latin-1"), 2, "prompt: invalid UTF-8"),
    "utf16.csv": ("prompt,completion\nq,a\n".encode("utf-16"), None, "is UTF-16"),
    "twice.csv": (b"prompt,prompt\nq,a\n", None, "'prompt' twice"),
    "bad_header.csv": (b"pr\xffompt,completion\nq,a\n", None, "invalid UTF-8"),
    "quoted_header.csv": (b'"prompt"x,completion\nq,a\n', None, "broken quoting in the header"),
    "semicolons.csv": (b"prompt;completion\nq;a\n", None, "separated by semicolons"),
    "tabs.csv": (b"prompt\tcompletion\nq\ta\n", None, "separated by tabs"),
    "header.csv": (HEAD, None, "a header without rows"),
    "empty.csv": (b"", None, "is empty"),
    "blank.csv": (b"\n\r\n  \n", None, "is empty"),
    "commas.tsv": (b"prompt,completion\nq\ta\n", None, "separated by commas"),
    "short.tsv": (b"prompt\tcompletion\nq\ta\nq\n", 2, "short row"),
    # Parquet and gzip
    "words.parquet": (b"hello", None, "is not a Parquet file"),
    "magic.parquet": (b"PAR1" + b"\x00" * 40 + b"PAR1", None, "is not a Parquet file"),
    "empty.parquet": (b"", None, "is not a Parquet file"),
    "gzip.parquet": (gzip.compress(b"x"), None, "is not a Parquet file"),
    "plain.jsonl.gz": (GOOD, None, "not a whole gzip file"),
    "cut.jsonl.gz": (gzip.compress(GOOD * 2000)[:-12], None, "not a whole gzip file"),
    "cut.csv.gz": (gzip.compress(HEAD + b"q,a\n" * 2000)[:-12], None, "not a whole gzip file"),
    "cut.json.gz": (gzip.compress(b"[" + GOOD + b"]")[:-12], None, "not a whole gzip file"),
    "garbage.jsonl.gz": (gzip.compress(GOOD) + b"garbage", None, "not a whole gzip file"),
    "flipped.jsonl.gz": (gzip.compress(GOOD * 50)[:30] + b"\x00\x01" + gzip.compress(GOOD * 50)[32:], None, "gzip"),
    "empty.jsonl.gz": (b"", None, "is empty"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, row, words = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    try:
        problems = [found for found in read_path(str(path)) if isinstance(found, UserError)]
    except UserError as raised:
        problems = [raised]
    assert len(problems) == 1
    line = checked_line(problems[0], path, row)
    assert words in line, line


def damaged_parquet() -> dict[str, bytes]:
    whole = as_parquet([{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(50)])
    cuts = {f"cut_{n}": whole[: len(whole) * n // 12] for n in range(1, 12)}
    holes = {}
    for n in range(24):
        place = 4 + (len(whole) - 12) * n // 24
        holes[f"hole_{n}"] = whole[:place] + b"\xff\x00\xff\x00" + whole[place + 4 :]
    return {**cuts, **holes}


DAMAGED = damaged_parquet()


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_parquet_is_read_or_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(DAMAGED[name])
    try:
        rows = list(read_path(str(path)))
    except UserError as problem:
        rows = [problem]
    for row in rows:
        if isinstance(row, UserError):
            checked_line(row, path, row.row)
        else:
            assert set(row.data) <= {"prompt", "completion"} or len(rows) == 50
    assert rows


def test_parquet_with_text_that_is_not_utf8(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    binary = pyarrow.array([b"good", b"b\xffd", b"fine"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, binary.buffers())
    table = pyarrow.table({"prompt": text, "completion": ["a", "b", "c"]})
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table, path)
    first, bad, last = read_path(str(path))
    assert isinstance(bad, UserError) and "prompt: invalid UTF-8 (got byte 0xff" in checked_line(bad, path, 2)
    assert isinstance(first, Row) and isinstance(last, Row) and last.data == {"prompt": "fine", "completion": "c"}


def test_parquet_columns_of_other_types(tmp_path: Path) -> None:
    import datetime

    values: list[Any] = [
        float("nan"),
        b"bytes",
        datetime.date(2026, 1, 2),
        datetime.datetime(2026, 1, 2),
        [1],
        {"a": 1},
    ]
    for value in values:
        path = tmp_path / "rows.parquet"
        path.write_bytes(as_parquet([{"prompt": "q", "completion": value}]))
        with pytest.raises(UserError) as caught:
            prepare(RowKind.conversations, data_of(path, CONVERSATION), RENDERER(), LengthOptions(), 0)
        assert "completion" in checked_line(caught.value, path, 1)


def test_a_parquet_file_with_a_column_twice(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="names the column 'prompt' twice"):
        list(read_path(str(tmp_path / "rows.parquet")))


_KEPT: list[Renderer] = []


def RENDERER() -> Renderer:
    if not _KEPT:
        _KEPT.append(Renderer(tiny_tokenizer()))
    return _KEPT[0]


# ------------------------------------------------------------------------------------------------- what is no fault
ODD = {
    "plain": "hello",
    "lines": "a\nb\r\nc\rd",
    "separators": "a\u2028b\u2029c\x85d\x0be\x0cf",
    "quotes": "a \"b\", 'c' `d`\\ \\n",
    "nul": "a\x00b",
    "emoji": "\U0001f469\u200d\U0001f680 e\u0301 \u0627\u0644",
    "bom inside": "a\ufeffb",
    "private use": "\uf8f4\uf8f5",
    "blank around": "  a \t",
    "commas": "a,b;c|d\te",
    "control strings": "<|end|></s>[INST]",
    "braces": "{0} {{x}} {% raw %} {{ bos_token }}",
    "ten megabytes": BIG,
}


@pytest.mark.parametrize("container", WRITERS)
@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("zipped", [False, True])
def test_odd_content_comes_out_as_it_went_in(tmp_path: Path, container: str, name: str, zipped: bool) -> None:
    if zipped and name == "ten megabytes":
        pytest.skip("slow and the same")
    if name == "nul" and container == "csv" and sys.version_info < (3, 11):
        pytest.skip("Python 3.10's csv neither writes nor reads it")
    rows = [{"prompt": "q", "completion": ODD[name]}, {"prompt": ODD[name], "completion": "a"}]
    content = WRITERS[container](rows)
    path = tmp_path / f"rows.{container}{'.gz' if zipped else ''}"
    path.write_bytes(gzip.compress(content, 1) if zipped else content)
    assert [row.data if isinstance(row, Row) else row for row in read_path(str(path))] == rows


@pytest.mark.parametrize("container", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("how", ["bom", "crlf", "blank lines", "no last newline", "all"])
def test_line_ends_marks_and_blank_lines_are_no_faults(tmp_path: Path, container: str, how: str) -> None:
    rows = [{"prompt": "q", "completion": "a"}, {"prompt": "r", "completion": "b"}]
    content = WRITERS[container](rows).replace(b"\r\n", b"\n")
    if how in ("blank lines", "all"):
        content = content.replace(b"\n", b"\n\n  \n")
    if how in ("crlf", "all"):
        content = content.replace(b"\n", b"\r\n")
    if how in ("no last newline", "all"):
        content = content.rstrip()
    if how in ("bom", "all"):
        content = b"\xef\xbb\xbf" + content
    path = tmp_path / f"rows.{container}"
    path.write_bytes(content)
    assert [row.data if isinstance(row, Row) else row for row in read_path(str(path))] == rows


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": 1}',
        b'{"a": 1}\n{"a": 2}\n',
        b'{\n "a": 1\n}\n{\n "a": 2\n}\n',
        b'{"data": [{"a": 1}, {"a": 2}], "version": "1"\n}',
        b'\xef\xbb\xbf\r\n[{"a": 1},\r\n\r\n{"a": 2}]\r\n',
    ],
)
def test_the_shapes_of_a_json_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.json").write_bytes(content)
    rows = [row.data for row in read_path(str(tmp_path / "rows.json")) if isinstance(row, Row)]
    assert rows == [{"a": 1}, {"a": 2}][: len(rows)] and len(rows) == content.count(b'"a"')


# ------------------------------------------------------------------------------------------------- all in one pass
@pytest.mark.parametrize("container", ["jsonl", "json", "csv", "parquet"])
def test_all_problems_of_a_file_in_one_pass(tmp_path: Path, container: str) -> None:
    rows = [{"prompt": "q" if n % 2 else "", "completion": f"a{n}"} for n in range(100)]
    path = tmp_path / f"rows.{container}"
    path.write_bytes(WRITERS[container](rows))
    with pytest.raises(UserError) as caught:
        prepare(RowKind.conversations, data_of(path, CONVERSATION), RENDERER(), LengthOptions(), 0)
    line = checked_line(caught.value, path, 1)
    assert ", and 49 more bad rows; " in line and len(caught.value.details) == 20
    assert [detail.split(":")[1] for detail in caught.value.details] == [str(n) for n in range(1, 41, 2)]
    card = prepare(
        RowKind.conversations, data_of(path, CONVERSATION, on_bad_row=OnBadRow.drop), RENDERER(), LengthOptions(), 0
    ).card
    assert card["rows"] == {"in": 100, "kept": 50, "dropped": {"empty": 50}, "truncated": 0}
    assert len(card["bad_rows"]) == 20


def test_a_file_that_breaks_off_is_refused_even_where_bad_rows_are_dropped(tmp_path: Path) -> None:
    """Nobody knows how many rows are missing; the bad rows before the break are named too."""
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"prompt": "q", "completion": "a"}, {"prompt": "", "completion": "a"}, {"prompt": "q", "comp')
    for on_bad_row in OnBadRow:
        with pytest.raises(UserError, match=r"rows\.json:2:prompt: empty .*, and 1 more bad row") as caught:
            prepare(
                RowKind.conversations,
                data_of(path, CONVERSATION, on_bad_row=on_bad_row),
                RENDERER(),
                LengthOptions(),
                0,
            )
        assert "the rest cannot be read" in caught.value.details[1]


# ------------------------------------------------------------------------------------------------ folders and links
def test_links_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    with pytest.raises(UserError, match="no data file in this folder"):
        list(read_path(str(folder)))
    (folder / "rows.jsonl").write_bytes(GOOD)
    (folder / "again").symlink_to(folder)
    (folder / "copy.jsonl").symlink_to(folder / "rows.jsonl")
    assert len(list(read_path(str(folder)))) == 1
    assert len(list(read_path(str(folder / "**" / "*.jsonl")))) == 1
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "more.jsonl").write_bytes(GOOD)
    (folder / "linked").symlink_to(elsewhere)
    assert len(list(read_path(str(folder)))) == 2
    loop = tmp_path / "loop.jsonl"
    loop.symlink_to(loop)
    with pytest.raises(UserError, match="a symbolic link that leads nowhere"):
        list(read_path(str(loop)))
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    with pytest.raises(UserError, match=r"loop\.jsonl: cannot be read: Too many levels"):
        list(read_path(str(folder)))


def test_a_pipe_is_no_data_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match="is not an ordinary file"):
        list(read_path(str(tmp_path / "rows.jsonl")))


@pytest.mark.parametrize("container", WRITERS)
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, container: str) -> None:
    path = tmp_path / f"rows.{container}"
    path.write_bytes(WRITERS[container]([{"prompt": "q", "completion": "a"}] * 3))
    rows = read_path(str(path))
    assert isinstance(next(iter(rows)), Row)
    with path.open("ab") as file:
        file.write(b"\n")
    with pytest.raises(UserError, match=r"changed while it was read .got \d+ bytes; expected \d+.; run again"):
        list(rows)


# -------------------------------------------------------------------------------------------------------- properties
scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(codec="utf-8"), max_size=12)
values = st.recursive(
    scalars | texts, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
)


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(st.dictionaries(texts, values, max_size=4), min_size=1, max_size=4))
def test_any_json_comes_out_as_it_went_in(rows: list[dict[str, Any]], tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("rows")
    for container in ("jsonl", "json"):
        path = folder / f"rows.{container}"
        path.write_bytes(WRITERS[container](rows))
        assert [row.data if isinstance(row, Row) else row for row in read_path(str(path))] == rows


@settings(max_examples=60, deadline=None)
@given(table=st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_any_table_comes_out_as_it_went_in(table: list[tuple[str, str]], tmp_path_factory: Any) -> None:
    rows = [{"prompt": left, "completion": right} for left, right in table]
    folder = tmp_path_factory.mktemp("rows")
    for container in ("csv", "parquet"):
        path = folder / f"rows.{container}"
        path.write_bytes(WRITERS[container](rows))
        assert [row.data if isinstance(row, Row) else row for row in read_path(str(path))] == rows


@settings(max_examples=150, deadline=None)
@given(
    content=st.binary(max_size=200) | st.text('[]{}",:\\n\r\n \t', max_size=60).map(str.encode), zipped=st.booleans()
)
@example(content=b"[\x80", zipped=False)
def test_any_bytes_are_read_or_refused(content: bytes, zipped: bool, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("rows")
    for container in ("jsonl", "json", "csv", "tsv", "txt", "parquet"):
        path = folder / f"rows.{container}{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(content) if zipped else content)
        try:
            rows = list(read_path(str(path)))
        except UserError as problem:
            rows = [problem]
        assert rows
        for row in rows:
            assert isinstance(row, Row) or checked_line(row, path, row.row)


COLUMNS = sorted(
    {column for _, form in FORMATS.items() for spelling in form.spellings for column in (*spelling, *form.extras)}
)
MESSAGE = {"role": "user", "content": "a", "from": "gpt", "value": "b", "text": "t", "replies": [], "output": "o"}
WEIRD: list[Any] = [
    None,
    True,
    0,
    -1,
    2.5,
    10**30,
    "",
    " ",
    "a",
    "[",
    "{",
    "[1]",
    "[[]]",
    "null",
    "nan",
    "\ud800",
    "user",
    b"a",
]
WEIRD += [
    [],
    {},
    [None],
    [[]],
    [{}],
    ["a", "b"],
    [1, 2],
    [MESSAGE],
    [MESSAGE, {**MESSAGE, "role": "assistant"}],
    MESSAGE,
]
WEIRD += [[{**MESSAGE, key: value}] for key in MESSAGE for value in (None, 3, [], {})]
WEIRD += [
    {**MESSAGE, "replies": [{**MESSAGE, "role": "assistant"}] * 2},
    [[["a"]]],
    [["a", "b"]],
    {"name": "f"},
    float("nan"),
]
WEIRD += [
    [{**MESSAGE, "tool_calls": value}] for value in ("x", [], [{}], [{"function": {"name": "f", "arguments": "{"}}])
]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_row_is_a_record_a_reason_or_a_problem(data: Any) -> None:
    """Every format, every kind, columns that it knows with values of any type: nothing but these three comes out."""
    name = data.draw(st.sampled_from(FORMATS.names()))
    form = FORMATS.get(name)
    known = sorted({column for spelling in form.spellings for column in (*spelling, *form.extras)})
    rows = data.draw(
        st.lists(
            st.dictionaries(st.sampled_from(known or COLUMNS), st.sampled_from(WEIRD), min_size=1),
            min_size=1,
            max_size=3,
        )
    )
    kind = data.draw(st.sampled_from(form.kinds))
    try:
        found = list(form().records(kind, [Row("f", n + 1, row) for n, row in enumerate(rows)]))
    except UserError as problem:  # options that this format needs
        assert problem.code in ("missing_option", "one_topic", "bad_option") and "\n" not in str(problem)
        return
    for one in found:
        if isinstance(one, UserError):
            assert str(one).startswith("f:") and "\n" not in str(one)
        elif not isinstance(one, Skip):
            assert one.id.startswith("f:")


def test_the_count_of_malformed_inputs() -> None:
    counts = dict.fromkeys(LETTERS.values(), 0)
    for case in ROW_CASES:
        counts[str(case.values[1])] += 1
    for name in FILES:
        for container in counts:
            counts[container] += f".{container}" in name
    counts["parquet"] += len(DAMAGED)
    assert all(count >= 60 for count in counts.values()), counts
    assert {DOCUMENT, PROMPT} <= {kind for _, form in FORMATS.items() for kind in form.kinds}


@pytest.mark.parametrize("container", WRITERS)
def test_the_command_prints_them_above_its_one_line(tmp_path: Path, container: str, capfd: Any) -> None:
    from tests.tiny_chain import refused, run

    path = tmp_path / f"rows.{container}"
    path.write_bytes(WRITERS[container]([{"prompt": "q" if n % 2 else "", "completion": "a"} for n in range(60)]))
    code, err = run(capfd, "pipeline=sft", "data=files", f"data.path={path}", f"out={tmp_path / 'runs'}")
    line = refused(code, err)
    assert line.startswith(f"align: {path}:1:prompt: empty (got ''; expected text), and 29 more bad rows; ")
    shown = [text for text in err.splitlines() if text.startswith(f"  {path}:")]
    assert len(shown) == 20 and shown[1] == f"  {path}:3:prompt: empty (got ''; expected text)"


@pytest.mark.parametrize("name", FILES)
def test_data_stats_answers_every_bad_file_in_one_object(tmp_path: Path, name: str, capfd: Any) -> None:
    from align.cli.dispatch import main

    path = tmp_path / name
    path.write_bytes(FILES[name][0])
    capfd.readouterr()
    assert main(["data", "stats", str(path), "--json"]) == 2
    out, err = capfd.readouterr()
    error = json.loads(out)["error"]
    assert error["file"] == str(path) and error["message"] and {"code", "hint", "row", "field"} <= error.keys()
    assert err.splitlines()[-1].startswith(f"align: {path}:") and "Traceback" not in err


@pytest.mark.parametrize("name", ["cut.jsonl", "cut.json.gz", "utf8.csv", "magic.parquet", "twice.jsonl", "empty.json"])
def test_a_run_refuses_before_it_trains(tmp_path: Path, name: str, capfd: Any) -> None:
    from tests.tiny_chain import run

    path = tmp_path / name
    path.write_bytes(FILES[name][0])
    code, err = run(capfd, "pipeline=sft", "data=files", f"data.path={path}", f"out={tmp_path / 'runs'}", "--json")
    assert code == 2 and err.splitlines()[-1].startswith(f"align: {path}:") and "Traceback" not in err
    assert not list(tmp_path.glob("runs/*/sft")) and not list(tmp_path.glob("runs/*/.*/*.safetensors"))
    assert not any(path.stat().st_size for path in tmp_path.glob("runs/*/.*/metrics.jsonl")), "no step was taken"
