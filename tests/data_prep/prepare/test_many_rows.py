"""Rows that are too many for memory: the same rows from a file, from worker processes, and from the cache."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.core.errors import UserError
from data_prep.options import DataOptions, LengthOptions, OnBadRow, SourceOptions
from data_prep.prepare import prepare as preparing
from data_prep.prepare import row_cache as kept
from data_prep.prepare import workers
from data_prep.prepare.arrow_rows import Joined, Rows, lengths_of
from data_prep.prepare.assemble import load
from data_prep.prepare.prepare import Prepared, Renderer, prepare
from data_prep.prepare.render_chunk import Chunks
from data_prep.quality.minhash import pairs_of_hashes, word_hashes, word_pairs
from data_prep.types import RowKind, Tokens, features_of
from tests.tiny import tiny_tokenizer

LENGTH = LengthOptions(max_length=64)
ROWS = 300


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tiny_tokenizer())


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Many begins at 40 rows, a chunk has 16, and the cache is the test's own."""
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(workers, "MANY", 40)
    monkeypatch.setattr(preparing, "LEAST_BYTES", 0)
    yield


def write(path: Path, count: int = ROWS, first: int = 0) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for number in range(first, first + count):
            said = [
                {"role": "user", "content": f"question {number}"},
                {"role": "assistant", "content": f"reply {number % 7}"},
            ]
            file.write(json.dumps({"messages": said}) + "\n")
    return path


def prepared(path: Path, renderer: Renderer, count: int | None = 0, seed: int = 0, **more: Any) -> Prepared[Tokens]:
    data = DataOptions(conversations=SourceOptions(path=str(path), **more), workers=count)
    return prepare(RowKind.conversations, data, renderer, LENGTH, seed)


def in_lists(path: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Prepared[Tokens]:
    with monkeypatch.context() as patch:
        patch.setattr(workers, "MANY", 10**9)
        found = prepared(path, renderer, **more)
    assert isinstance(found.train, list)
    return found


def test_rows_of_a_file_equal_rows_of_a_list(
    renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl")
    lists, stored = in_lists(path, renderer, monkeypatch), prepared(path, renderer)
    assert isinstance(stored.train, Rows) and isinstance(stored.eval, Rows)
    assert list(stored.train) == lists.train and list(stored.eval) == lists.eval
    assert stored.train[3:9] == lists.train[3:9] and stored.train[-1] == lists.train[-1]
    assert (stored.card, stored.digest) == (lists.card, lists.digest)
    assert (stored.highest, stored.ended) == (lists.highest, lists.ended)
    assert list(pickle.loads(pickle.dumps(stored.eval))) == lists.eval


def test_lengths_are_known_without_making_rows(
    renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists, stored = (
        found(write(tmp_path / "a.jsonl"))
        for found in (lambda path: in_lists(path, renderer, monkeypatch), lambda path: prepared(path, renderer))
    )
    monkeypatch.setattr(Rows, "_at", None)
    for rows, same in ((stored.train, lists.train), (stored.eval, lists.eval)):
        assert lengths_of(rows).tolist() == lengths_of(same).tolist() == [len(row.ids) for row in same]


def test_some_rows_of_a_file_with_others_behind_them(renderer: Renderer, tmp_path: Path) -> None:
    rows = prepared(write(tmp_path / "rows.jsonl"), renderer).train
    assert isinstance(rows, Rows)
    more = [Tokens([1, 2, 3], [False, True, True], "more")]
    both, listed = Joined(rows, np.array([0, 5, 7]), more), [rows[0], rows[5], rows[7], *more]
    assert list(both) == both[:] == listed and both[1:3] == listed[1:3] and len(both) == 4
    assert both[-1] == more[0] and both[-4] == rows[0]
    assert lengths_of(both).tolist() == [len(row.ids) for row in listed]
    for outside in (4, -5):
        with pytest.raises(IndexError):
            both[outside]
    assert not Joined([], np.arange(0), [])


def test_worker_processes_change_nothing(renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", 90)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"messages": [{"role": "user", "content": "x"}, {"role": "nobody", "content": "y"}]}\n')
    alone = in_lists(path, renderer, monkeypatch, on_bad_row=OnBadRow.drop)
    shared = prepared(path, renderer, 2, on_bad_row=OnBadRow.drop)
    assert list(shared.train) == alone.train and shared.card == alone.card and shared.card["rows"]["in"] == 91


def test_flipped_pairs_are_flipped_in_training_alone(
    renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.jsonl"
    rows = [{"prompt": f"question {n}", "plain": f"plain {n % 5}", "merry": f"merry {n % 5}"} for n in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"preferred": "merry", "other": "plain", "noise": 0.3}
    source = SourceOptions(path=str(path), format="answer_table", options=options)
    data = DataOptions(preferences=source, workers=0)
    stored = prepare(RowKind.preferences, data, renderer, LENGTH, 0)
    with monkeypatch.context() as patch:
        patch.setattr(workers, "MANY", 10**9)
        lists = prepare(RowKind.preferences, data, renderer, LENGTH, 0)
    assert list(stored.train) == list(lists.train) and stored.digest == lists.digest
    flipped = sum(renderer.decode(pair.chosen).startswith("plain") for pair in stored.train)
    assert 0 < flipped == stored.card["notes"]["training labels flipped on purpose (noise)"]
    assert all(renderer.decode(pair.chosen).startswith("merry") for pair in stored.eval)


def test_documents(renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {n} " * (n % 40 + 1)}) + "\n" for n in range(100)))
    data = DataOptions(text=SourceOptions(path=str(path)), workers=0)
    stored = prepare(RowKind.text, data, renderer, LENGTH, 0)
    with monkeypatch.context() as patch:
        patch.setattr(workers, "MANY", 10**9)
        lists = prepare(RowKind.text, data, renderer, LENGTH, 0)
    assert list(stored.train) == list(lists.train) and stored.card == lists.card


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        (RowKind.conversations, {"prompt": "question {n}", "completion": "answer {n}", "features": [1.0, 0.25]}),
        (RowKind.preferences, {"prompt": "question {n}", "chosen": "good {n}", "rejected": "bad {n}", "margin": 0.1}),
        (RowKind.unpaired, {"prompt": "question {n}", "completion": "answer {n}", "label": True}),
        (RowKind.prompts, {"prompt": "question {n}", "ground_truth": 3, "features": "pirate", "split": "train"}),
        (RowKind.text, {"text": "the tale of {n}"}),
    ],
    ids=lambda value: value.name if isinstance(value, RowKind) else "",
)
def test_few_rows_lie_in_a_file_where_processes_share_it(
    kind: RowKind, row: dict[str, Any], renderer: Renderer, tmp_path: Path
) -> None:
    path = tmp_path / "few.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for n in range(12):
            told = {name: value.format(n=n) if isinstance(value, str) else value for name, value in row.items()}
            told |= {"split": "eval" if n % 4 == 0 else "train"} if "split" in row else {}
            file.write(json.dumps(told) + "\n")
    data = DataOptions(**{kind.option: SourceOptions(path=str(path))}, workers=0)
    lists, stored = (prepare(kind, data, renderer, LENGTH, 0, on_disk=one) for one in (False, True))
    assert isinstance(lists.train, list) and isinstance(stored.train, Rows)
    for mapped in (stored, load(stored.train.path.parent)):
        assert list(mapped.train) == lists.train and list(mapped.eval) == lists.eval and lists.eval
        assert (mapped.card, mapped.digest, mapped.highest) == (lists.card, lists.digest, lists.highest)
        assert (mapped.asked.tolist(), mapped.held.tolist()) == (lists.asked.tolist(), lists.held.tolist())


def test_rows_that_none_is_left_of_make_no_file(renderer: Renderer, tmp_path: Path) -> None:
    path = tmp_path / "held.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "split": "eval"}\n', encoding="utf-8")
    data = DataOptions(conversations=SourceOptions(path=str(path)), workers=0)
    with pytest.raises(UserError, match="no training row is left"):
        prepare(RowKind.conversations, data, renderer, LENGTH, 0, on_disk=True)
    assert not entries(tmp_path)


# ------------------------------------------------------------------------------------------------- the cache
def entries(tmp_path: Path) -> set[str]:
    folder = tmp_path / "cache" / "rows"
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


def test_the_same_data_is_rendered_once(renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl")
    first = prepared(path, renderer)
    assert len(entries(tmp_path)) == 1
    monkeypatch.setattr(preparing, "rendered", None)  # nothing can be rendered any more
    again = prepared(path, renderer)
    assert list(again.train) == list(first.train) and again.card == first.card


def test_every_change_of_what_decides_the_rows_misses(
    renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl")
    seen = [prepared(path, renderer).digest]
    count = 1

    def missed() -> None:
        nonlocal count
        count += 1
        assert len(entries(tmp_path)) == count

    status = os.stat(path)
    write(path, ROWS - 1)
    write(path, 1, ROWS)  # other content
    write(path, ROWS, 1)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # an unchanged time of change does not hide it
    assert prepared(path, renderer).digest not in seen
    missed()
    prepared(path, renderer, seed=1)
    missed()
    prepared(path, renderer, eval_share=0.2)
    missed()
    data = DataOptions(conversations=SourceOptions(path=str(path)), system="Be kind.", workers=0)
    prepare(RowKind.conversations, data, renderer, LENGTH, 0)
    missed()
    prepare(RowKind.conversations, data, renderer, LengthOptions(max_length=63), 0)
    missed()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template + "{# another #}"
    prepared(path, Renderer(tokenizer))
    missed()
    monkeypatch.setattr(preparing, "code_digest", lambda: "other code")
    prepared(path, renderer)
    missed()


def test_nothing_is_left_of_a_stopped_run(renderer: Renderer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    with path.open("a", encoding="utf-8") as file:
        file.write("{}\n")
    with pytest.raises(Exception, match="messages"):
        prepared(path, renderer)
    assert entries(tmp_path) == set()


def test_a_damaged_entry_is_made_again(renderer: Renderer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    first = prepared(path, renderer)
    (name,) = entries(tmp_path)
    (tmp_path / "cache" / "rows" / name / "record.json").write_text("{")
    assert list(prepared(path, renderer).train) == list(first.train)


def test_the_least_used_entries_go_first(renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGN_CACHE_GB", "0.00001")
    path = write(tmp_path / "a.jsonl")
    prepared(path, renderer)
    old = entries(tmp_path)
    prepared(path, renderer, seed=1)
    assert len(entries(tmp_path)) == 1 and not old & entries(tmp_path)


def test_without_a_cache_rows_lie_in_a_temporary_folder(
    renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "file"))
    found = prepared(write(tmp_path / "a.jsonl"), renderer)
    assert isinstance(found.train, Rows) and found.train[0].ids


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_line_and_leaves_nothing(
    renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = kept.Kept.folder

    def full(self: kept.Kept) -> Path:
        folder = made(self)
        (folder / "rows.arrow").symlink_to("/dev/full")
        return folder

    monkeypatch.setattr(kept.Kept, "folder", full)
    with pytest.raises(UserError, match=r"rows cannot be written .*No space left.*ALIGN_CACHE") as caught:
        prepared(write(tmp_path / "a.jsonl"), renderer)
    assert caught.value.code == "cannot_write" and entries(tmp_path) == set()


def test_two_runs_may_fill_the_cache_at_once(
    renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run begins and ends while this one is about to."""
    path, settled, others = write(tmp_path / "a.jsonl"), preparing.settled, []

    def after_the_other(*given: Any) -> Any:
        monkeypatch.setattr(preparing, "settled", settled)
        others.append(prepared(path, renderer))
        return settled(*given)

    monkeypatch.setattr(preparing, "settled", after_the_other)
    found = prepared(path, renderer)
    assert len(entries(tmp_path)) == len(others) == 1
    assert list(found.train) == list(others[0].train) and found.card == others[0].card


def test_data_that_changes_on_the_way_is_not_kept(
    renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, settled = write(tmp_path / "a.jsonl"), preparing.settled

    def changing(*given: Any) -> Any:
        path.write_text(path.read_text() * 2)
        return settled(*given)

    monkeypatch.setattr(preparing, "settled", changing)
    assert prepared(path, renderer).card["rows"]["in"] == ROWS
    assert all(name.startswith(".") for name in entries(tmp_path)), "it goes with the process"


class Dying(Chunks):
    """Ends its process as the system does when memory is short."""

    def __call__(self, records: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line_and_leaves_nothing(
    renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "Chunks", Dying)
    with pytest.raises(UserError, match="a worker process that renders rows died") as caught:
        prepared(write(tmp_path / "a.jsonl"), renderer, 1)
    assert caught.value.code == "worker_died" and entries(tmp_path) == set()


def test_code_digest_covers_this_package(tmp_path: Path) -> None:
    package = Path(kept.__file__).parent.parent
    assert kept.code_digest() == kept.digest_of_package(package)
    copy = tmp_path / "data_prep"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert kept.digest_of_package(copy) == kept.code_digest()
    for file in ("formats/base.py", "generators/smalltalk_topics/daily.yaml"):
        before = kept.digest_of_package(copy)
        (copy / file).write_text((copy / file).read_text(encoding="utf-8") + "\n", encoding="utf-8")
        assert kept.digest_of_package(copy) != before, file


# ------------------------------------------------------------------------------------------------- word pairs
def test_word_pairs_of_many_texts_are_those_of_each() -> None:
    texts = ["", "one", "a b a b a b", "One two", "x", "", "the end . the end . the end"]
    flat, counts = pairs_of_hashes(*word_hashes(texts))
    for text, part in zip(texts, np.split(flat, np.cumsum(counts)[:-1]), strict=True):
        assert sorted(part.tolist()) == word_pairs(text).tolist()
    front = pairs_of_hashes(*word_hashes([texts[-1][:13]]))[0]
    assert flat[-int(counts[-1]) :][: len(front)].tolist() == front.tolist()


def test_features_are_those_of_the_row_in_the_file_too(tmp_path: Path, renderer: Renderer) -> None:
    """As category and as numbers; they are part of what a row says, and its ids know them."""
    given = ["calm", [0.5, -1], 2, None, "[1, 2.5]"]
    wanted = ["calm", (0.5, -1.0), (2.0,), None, (1.0, 2.5)]
    rows = [
        {"prompt": f"question {n}", "completion": "reply", **({"features": one} if one is not None else {})}
        for n, one in enumerate(given * 20)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for _ in range(2):  # the second time from the cache
        found = prepared(path, renderer, eval_share=0.0)
        assert isinstance(found.train, Rows)
        assert [row.features for row in found.train] == wanted * 20
        assert [features_of(row.ids) for row in found.train] == wanted * 20
    path.write_text("".join(json.dumps({**row, "features": "loud"}) + "\n" for row in rows), encoding="utf-8")
    assert prepared(path, renderer, eval_share=0.0).digest != found.digest


@pytest.mark.parametrize("wrong", [[], True, {"a": 1}, ["x"], [1, True], "[1, NaN]", "[1, inf]"])
def test_features_that_are_none_are_named_by_row(wrong: Any, tmp_path: Path, renderer: Renderer) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d", "features": wrong}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        prepared(path, renderer)
    assert (caught.value.row, caught.value.field) == (2, "features")
