"""Rows as users bring them, beyond the plain form of each format: read exactly, or refused in one line that helps."""

from __future__ import annotations

import bz2
import datetime
import decimal
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from align.cli.data_options import StatsOptions
from data_prep.core.errors import UserError
from data_prep.options import DataOptions, LengthOptions, SourceOptions
from data_prep.prepare.prepare import prepare
from data_prep.records.stream import open_any
from data_prep.rendering.renderer import Renderer
from data_prep.sources.files import digest_path, read_path
from data_prep.sources.rows import Row
from data_prep.types import RowKind
from tests.data_prep.formats.field_rows import CALL, HI, LOADS, ONE, REFUSED, YO, C, P, assistant
from tests.data_prep.formats.test_golden_rows import shown
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tiny_tokenizer())


@pytest.mark.parametrize(
    ("form", "kind", "rows", "options", "expected"), [one[1:] for one in LOADS], ids=[one[0] for one in LOADS]
)
def test_it_loads(
    renderer: Renderer, tmp_path: Path, form: str, kind: RowKind, rows: Any, options: Any, expected: list[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (rows if isinstance(rows, list) else [rows])))
    data = DataOptions(**{kind.option: SourceOptions(path=str(path), options=options, eval_share=0.0)})
    prepared = prepare(kind, data, renderer, LengthOptions(512), 0)
    assert [shown(renderer, row) for row in prepared.train] == expected
    assert prepared.card["format"] == form


@pytest.mark.parametrize(("row", "field", "words"), [one[1:] for one in REFUSED], ids=[one[0] for one in REFUSED])
def test_it_is_refused_by_file_row_and_field(tmp_path: Path, row: Any, field: str, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    stream = open_any(StatsOptions().given(str(path)))
    assert not list(stream)
    (problem,) = stream.tally.problems
    assert str(problem).startswith(f"{path}:1:{field}: ") and words in str(problem), str(problem)


def test_grades_that_are_none_and_prompts_that_make_no_pair() -> None:
    from data_prep.formats import FORMATS
    from data_prep.sources.rows import Skip

    said = [("q", "a", 1), ("q", "b", "high"), ("q", "c", None), ("q", "d", 1.0), ("r", "e", 3)]
    rows = [Row("f", n, {"prompt": q, "response": a, "score": s}) for n, (q, a, s) in enumerate(said, start=1)]
    found = list(FORMATS.get("rated")().records(P, rows))
    assert [str(one).split(" (")[0] for one in found if isinstance(one, UserError)] == [
        "f:2:score: wrong type",
        "f:3:score: wrong type",
    ]
    assert [one.reason for one in found if isinstance(one, Skip)] == ["tied", "no_counterpart"]


def test_texts_that_a_template_has_been_applied_to_are_counted(tmp_path: Path) -> None:
    """Templates applied twice: the marks are learnt as text, which no error would ever tell."""
    texts = [
        "[INST] Hi [/INST]",
        "<|im_start|>user\nHi<|im_end|>",
        "### Instruction:\nHi",
        "Hi</s>",
        "a < | b ### c [1] <s>x</s> y",
    ]
    shapes = (
        ("conversation", [{"prompt": text, "completion": "yo"} for text in texts]),
        ("preference", [{"prompt": "q", "chosen": text, "rejected": "no"} for text in texts]),
        ("document", [{"text": text} for text in texts]),
    )
    for kind, rows in shapes:
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        stream = open_any(StatsOptions().given(str(path)))
        assert stream.kind == kind and len(list(stream)) == 5
        marks = {note.split("'")[1]: count for note, count in stream.about()["notes"].items()}
        one_each = ("[INST]", "[/INST]", "<|im_start|>", "<|im_end|>", "### Instruction:", "</s>")
        assert marks == dict.fromkeys(one_each, 1)


def test_what_messages_say_beside_their_content_is_counted() -> None:
    from data_prep.formats import FORMATS

    form = FORMATS.get("messages")()
    rows = [Row("f", 1, {"messages": [HI, assistant("yo", reasoning_content="so", weight=1, refusal=None)]})]
    assert len(list(form.conversations(rows))) == 1
    assert dict(form.notes) == {"messages with 'reasoning_content', which is not read": 1}


def test_turns_that_do_not_take_turns_are_counted() -> None:
    from data_prep.formats import FORMATS

    form, late = FORMATS.get("messages")(), {"role": "system", "content": "s"}
    called, told = assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "t"}
    orders: list[list[Any]] = [
        [HI, YO],
        [HI, HI, YO],
        [HI, YO, YO],
        [late, HI, YO, late, HI, YO],
        [HI, called, told, YO],
    ]
    assert len(list(form.conversations([Row("f", 1, {"messages": order}) for order in orders]))) == 5
    assert dict(form.notes) == {
        "dialogues with two turns of one role after one another": 2,
        "dialogues with a system message after their first turn": 1,
    }


# --------------------------------------------------------------------------------------------------------- containers
ROWS = [{"prompt": "q", "completion": "a"}, {"prompt": "r", "completion": "b"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
HEAD = b"prompt,completion\n"


def parquet(**columns: Any) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


FILES: dict[str, bytes] = {
    "lines.json": LINES,
    "array.json": json.dumps(ROWS).encode(),
    "data.json": json.dumps({"version": "1", "data": ROWS}).encode(),
    "wide.json": json.dumps({"version": "1", "rows": ROWS}, indent=1).encode(),
    "some.ndjson": LINES,
    "SOME.JSONL": LINES,
    "two.jsonl.gz": gzip.compress(LINES[: LINES.index(b"\n") + 1]) + gzip.compress(LINES[LINES.index(b"\n") + 1 :]),
    "array.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "plain.csv.gz": gzip.compress(HEAD + b"q,a\nr,b\n"),
    "plain.tsv.gz": gzip.compress(b"prompt\tcompletion\nq\ta\nr\tb\n"),
    "quoted.csv": b'\xef\xbb\xbf"prompt","completion"\r\n"q","a"\r\n"r","b"\r\n',
    "blank_in_header.csv": b"prompt, completion\nq,a\nr,b\n",
    "old_mac.csv": b"prompt,completion\rq,a\rr,b\r",
}


@pytest.mark.parametrize("name", FILES)
def test_a_container_gives_its_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    assert [row.data if isinstance(row, Row) else row for row in read_path(str(tmp_path / name))] == ROWS


def test_arrow_types(tmp_path: Path) -> None:
    import pyarrow as pa

    talk = [[{"role": "user", "content": "q", "tool_calls": None, "weight": None}, YO | {"weight": 1.0}]]
    cases: dict[str, bytes] = {
        "large": parquet(prompt=pa.array(["q"], pa.large_string()), completion=pa.array(["a"], pa.string_view())),
        "dictionary": parquet(prompt=pa.array(["q"]).dictionary_encode(), completion=["a"]),
        "decimal": parquet(prompt=["q"], chosen=["a"], rejected=["b"], margin=[decimal.Decimal("1.50")]),
        "structs": parquet(messages=pa.array(talk)),
        "date": parquet(prompt=["q"], completion=["a"], when=[datetime.datetime(2026, 1, 2)]),
        "index": parquet(prompt=["q"], completion=["a"], __index_level_0__=[0]),
    }
    for name, content in cases.items():
        (tmp_path / f"{name}.parquet").write_bytes(content)
        stream = open_any(StatsOptions().given(str(tmp_path / f"{name}.parquet")))
        (record,) = stream
        assert (record.messages if hasattr(record, "messages") else record.prompt)[0].content == "q"
        assert getattr(record, "margin", 1.5) == 1.5 and not stream.tally.problems


def test_a_date_that_python_cannot_hold(tmp_path: Path) -> None:
    import pyarrow as pa

    path = tmp_path / "rows.parquet"
    path.write_bytes(parquet(prompt=["q", "r"], completion=["a", "b"], at=pa.array([2**62, 0], pa.timestamp("us"))))
    bad, good = read_path(str(path))
    assert str(bad).startswith(f"{path}:1:at: cannot be read: ") and isinstance(good, Row)


NOT_WHAT_IT_SAYS: dict[str, tuple[bytes, str]] = {
    "rows.jsonl": (gzip.compress(LINES), "is gzip'd (expected jsonl); let its name end in .gz"),
    "zipped.csv": (b"PK\x03\x04" + b"\0" * 30, "is a zip archive (expected csv); unpack it"),
    "columns.json": (b"PAR1" + b"\0" * 30, "is a Parquet file (expected json)"),
    "page.json": (b"<!DOCTYPE html>\n<html></html>", "is a web page (HTML) (expected json); download"),
    "page.csv": (b"\n <html lang='en'>, </html>", "is a web page (HTML) (expected csv)"),
    "page.parquet": (b"<!doctype html>", "is a web page (HTML) (expected parquet)"),
    "lfs.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS"),
    "lfs.txt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS"),
    "marked.tsv": ("prompt\tcompletion\nq\ta\n".encode("utf-16"), "is UTF-16 (expected UTF-8); save it as UTF-8"),
    "unmarked.csv": ("prompt,completion\nq,a\n".encode("utf-16-le"), "is UTF-16 (expected UTF-8)"),
    "quoted.tsv": (b'prompt\tcompletion\n"q ""x"""\ta\n', ':1:prompt: a quoted field (got "q ""x"""; expected no quo'),
    "open.csv": (HEAD + b'q,a\n"r,b\ns,c\nt,d\n', ":2: broken quoting: unexpected end of data"),
    "splits.json": (json.dumps({"train": ROWS, "test": ROWS}).encode(), "several lists of rows (got train, test; exp"),
    "none.json": (b'{"data": [], "version": "1"}', "is empty (no rows under 'data')"),
    "rows.zip": (b"PK", "unknown kind of file (got .zip; expected .jsonl, .ndjson"),
    "rows.zst": (b"\x28\xb5\x2f\xfd", "unknown kind of file (got no ending; expected .jsonl, .ndjson"),
    "zstd.jsonl": (b"\x28\xb5\x2f\xfd" + b"\0" * 30, "is packed with zstd (expected jsonl); let its name end in .zst"),
    "columns.csv": (b"ARROW1" + b"\0" * 30, "is an Arrow file (expected csv); let its name end in .arrow"),
    "rows.arrow": (b"ARROW2" + b"\0" * 30, "is not an Arrow file"),
    "rows.xlsx": (b"PK", "also with .gz, .bz2, .xz or .zst); save it as .csv"),
    "rows.pkl": (b"\x80", "pickles can run code and are never read"),
    "rows": (LINES, "(got no ending; expected .jsonl"),
}


@pytest.mark.parametrize("name", NOT_WHAT_IT_SAYS)
def test_a_file_that_is_not_what_its_name_says(tmp_path: Path, name: str) -> None:
    content, words = NOT_WHAT_IT_SAYS[name]
    path = tmp_path / name
    path.write_bytes(content)
    try:
        (problem,) = [found for found in read_path(str(path)) if isinstance(found, UserError)]
    except UserError as raised:
        problem = raised
    assert str(problem).startswith(f"{path}:") and words in str(problem), str(problem)


# ------------------------------------------------------------------------------------------------------------- folders
def test_names_of_files_say_which_rows_evaluate(tmp_path: Path) -> None:
    def sides() -> list[Any]:
        return [row.data.get("split") for row in read_path(str(tmp_path)) if isinstance(row, Row)]

    (tmp_path / "train-00000-of-00001.jsonl").write_bytes(LINES)
    (tmp_path / "trainer.csv").write_bytes(HEAD + b"s,c\n")
    assert sides() == [None] * 3
    (tmp_path / "test.jsonl").write_bytes(LINES + b'{"prompt": "s", "completion": "c", "split": "train"}\n')
    assert sides() == ["eval", "eval", "train", "train", "train", "train"]
    (tmp_path / "train-00000-of-00001.jsonl").unlink()
    (tmp_path / "trainer.csv").unlink()
    assert sides() == [None, None, "train"]


def test_cards_and_saved_data_sets_beside_the_rows(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text('{"features": {}}')
    (tmp_path / "data.orc").write_bytes(b"ORC")
    with pytest.raises(UserError, match=r"no data file in this folder \(expected .*\); save it as \.parquet"):
        list(read_path(str(tmp_path)))
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    assert len(list(read_path(str(tmp_path)))) == 2


def test_what_datasets_saved_to_disk_is_read_side_by_side(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    saved = DatasetDict({"train": Dataset.from_list(ROWS * 1500), "test": Dataset.from_list(ROWS[:1])})
    saved.save_to_disk(str(tmp_path / "saved"))
    found = [row for row in read_path(str(tmp_path / "saved")) if isinstance(row, Row)]
    assert [row.data for row in found] == [{**ROWS[0], "split": "eval"}] + [
        {**row, "split": "train"} for row in ROWS * 1500
    ]
    assert found[-1].row == 3000
    assert [row.data for row in read_path(str(tmp_path / "saved" / "test")) if isinstance(row, Row)] == ROWS[:1]


@pytest.mark.parametrize("end", [".arrow", ".feather", ".arrow.gz"])
def test_arrow_files_are_read_in_batches(tmp_path: Path, end: str) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS * 1500)
    whole = io.BytesIO()
    with pa.ipc.new_file(whole, table.schema) as writer:
        writer.write_table(table, max_chunksize=1700)
    content = whole.getvalue()
    path = tmp_path / f"rows{end}"
    path.write_bytes(gzip.compress(content) if end.endswith(".gz") else content)
    assert [row.data for row in read_path(str(path)) if isinstance(row, Row)] == ROWS * 1500
    path.write_bytes(content[: len(content) // 2] if not end.endswith(".gz") else gzip.compress(content[:900]))
    with pytest.raises(UserError, match="is not an Arrow file"):
        list(read_path(str(path)))


def _zstd(content: bytes) -> bytes:
    import pyarrow as pa

    return bytes(pa.compress(content, codec="zstd", asbytes=True))


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": _zstd}


@pytest.mark.parametrize("end", PACKERS)
def test_packed_files_give_the_same_rows(tmp_path: Path, end: str) -> None:
    content = b"".join(
        json.dumps({"prompt": f"q{n}", "completion": "a" * (n % 97)}).encode() + b"\n" for n in range(9999)
    )
    plain, path = tmp_path / "rows.jsonl", tmp_path / f"rows.jsonl{end}"
    plain.write_bytes(content)
    packed = PACKERS[end](content)
    path.write_bytes(packed)
    expected = [row.data for row in read_path(str(plain)) if isinstance(row, Row)]
    assert [row.data for row in read_path(str(path)) if isinstance(row, Row)] == expected and len(expected) == 9999
    assert digest_path(str(path)) != digest_path(str(plain)), "names are part of it"
    path.write_bytes(PACKERS[end](content[:5000]) + PACKERS[end](content[5000:]))
    assert [row.data for row in read_path(str(path)) if isinstance(row, Row)] == expected
    for broken in (packed[: len(packed) // 2], packed[:20] + bytes(40) + packed[60:], b"", b"{}\n"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"is not a whole (gzip|bzip2|xz|zstd) file|is empty"):
            list(read_path(str(path)))


def test_a_mapping_for_names_of_any_sort(tmp_path: Path, renderer: Renderer) -> None:
    row = {"Frage (de)": "Hi", "meta": {"answers": [{"text": "yo"}]}, "prompt": "no", "context": {"text": ["x"]}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    columns = {"prompt": "{Frage (de)}", "completion": "meta.answers.0.text"}
    source = SourceOptions(path=str(tmp_path / "rows.jsonl"), columns=columns, eval_share=0.0)
    prepared = prepare(C, DataOptions(conversations=source, unused=["context"]), renderer, LengthOptions(512), 0)
    assert [shown(renderer, row) for row in prepared.train] == [ONE]


# ------------------------------------------------------------------------------------------------------- what is said
def test_a_line_stays_readable_however_many_columns_there_are(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({f"{n:04}" + "x" * 100: n for n in range(3000)}) + "\n")
    with pytest.raises(UserError, match=r"columns 0000x+\.\.\., .* and 2980 more") as caught:
        open_any(StatsOptions().given(str(path)))
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("value", "words"),
    [("1e999", "the number 1e999 is out of range"), ("[-1e400]", "is out of range"), ("9" * 5000, "too many digits")],
)
def test_numbers_that_would_not_come_out_as_written(tmp_path: Path, value: str, words: str) -> None:
    for name, content in (("a.jsonl", '{"a": 1}\n{"a": %s}\n'), ("a.json", '[{"a": 1}, {"a": %s}]')):
        (tmp_path / name).write_text(content % value)
        good, bad = read_path(str(tmp_path / name))
        assert isinstance(good, Row) and words in str(bad) and str(bad).startswith(f"{tmp_path / name}:2: ")


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ({"path": "FILE"}, "data.conversations.on_bad_row=drop"),
        ({"conversations": SourceOptions(path="FILE")}, "data.conversations.on_bad_row=drop"),
        ({"mix": {"a": {"path": "FILE"}}}, "data.mix.a.on_bad_row=drop"),
    ],
)
def test_the_advice_is_an_option_that_the_run_has(
    tmp_path: Path, renderer: Renderer, words: dict[str, Any], option: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES + b'{"prompt": "", "completion": "a"}\n')
    given = {
        key: json.loads(json.dumps(value).replace("FILE", str(path))) if not isinstance(value, SourceOptions) else value
        for key, value in words.items()
    }
    if "conversations" in given:
        given["conversations"].path = str(path)
    with pytest.raises(UserError) as caught:
        prepare(C, DataOptions(**given), renderer, LengthOptions(512), 0)
    assert f"or set {option} to drop and count such rows" in str(caught.value)


def test_the_command_names_every_bad_row_and_counts_them(tmp_path: Path, capfd: Any) -> None:
    from align.cli.dispatch import main

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "q" * (n % 2), "completion": "a"}) + "\n" for n in range(50)))
    assert main(["data", "stats", str(path)]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in lines[:20]] == [str(n) for n in range(1, 41, 2)] and len(lines) == 21
    assert lines[-1].startswith(f"align: {path}:1:prompt: empty (got ''; expected text), and 24 more bad rows; ")
    assert main(["data", "stats", str(path), "--json"]) == 2
    answer = json.loads(capfd.readouterr().out)
    assert (answer["bad_rows"], len(answer["errors"]), answer["error"]["row"]) == (25, 20, 1)


def test_a_broken_file_is_not_said_to_be_mended_by_dropping(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(json.dumps(ROWS).encode()[:-5])
    stream = open_any(StatsOptions().given(str(path)))
    records = list(stream)
    with pytest.raises(UserError, match="mend the file: nobody knows how many rows are missing"):
        stream.tally.check_whole()
    assert stream.tally.seen == len(records) + sum(stream.tally.dropped.values())
