"""run.json: one type, one reader, one writer; what earlier versions wrote stays as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.run_record import RunRecord, StageEntry, is_run
from data_prep.core.errors import UserError
from data_prep.core.files import write_text

EARLIER = Path(__file__).resolve().parents[1] / "contracts/earlier_run/run.json"


def test_the_record_of_an_earlier_version_is_written_as_it_was_read(tmp_path):
    (tmp_path / "run.json").write_bytes(EARLIER.read_bytes())
    record = RunRecord.open(tmp_path)
    assert [entry.status for entry in record.stages] == ["done"] * len(record.stages)
    record.write()
    earlier = json.loads(EARLIER.read_text("utf-8"))
    assert json.loads((tmp_path / "run.json").read_text("utf-8")) == {
        **earlier,
        "warnings": [],
        "stages": [{**entry, "peak_gpu_bytes": None} for entry in earlier["stages"]],
    }


def test_keys_that_are_not_known_stay(tmp_path):
    text = {"format_version": 1, "name": "r", "status": "done", "later": 1, "stages": [{"name": "a", "new": [2]}]}
    (tmp_path / "run.json").write_text(json.dumps(text), "utf-8")
    record = RunRecord.open(tmp_path)
    assert record.as_dict() == {**text, "warnings": [], "stages": [{"name": "a", "dir": "a", "new": [2]}]}


def test_a_trained_stage_has_every_key_and_another_what_is_known():
    trained = StageEntry("sft", "done", digest="d", parents=[], skipped=False).as_dict()
    assert trained["on_parent"] is None and trained["tokens"] is None and trained["dir"] == "sft"
    begun = StageEntry("sft", "running", ".staging-sft", skipped=False, metrics={}).as_dict()
    assert begun == {"name": "sft", "status": "running", "dir": ".staging-sft", "skipped": False, "metrics": {}}


@pytest.mark.parametrize("text", ["{", "[]", "3", "null", '{"name": "x"}', '{"stages": null}', '{"stages": 3}', "\xff"])
def test_a_torn_record_is_refused_or_empty(tmp_path, text):
    (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"run\.json cannot be read"):
        RunRecord.open(tmp_path)
    assert RunRecord.left_in(tmp_path).stages == []


def test_what_is_finished_is_still_there(tmp_path):
    for name in ("sft", "ppo"):
        (tmp_path / name).mkdir()
    (tmp_path / "sft" / "checkpoint.json").touch()
    entries = [StageEntry("sft", "done", digest="1"), StageEntry("ppo", "done", digest="2")]
    record = RunRecord(tmp_path, stages=[*entries, StageEntry("gone", "done", digest="3"), StageEntry("begun")])
    assert record.finished() == entries
    assert record.finished("checkpoint.json") == entries[:1]


def test_entries_stand_in_the_order_of_the_pipeline(tmp_path):
    record = RunRecord(tmp_path)
    for name in ("ppo", "sft", "earlier", "sft"):
        record.put(StageEntry(name, digest=str(len(record.stages))), ["sft", "ppo"])
    assert [(entry.name, entry.digest) for entry in record.stages] == [("earlier", "2"), ("sft", "3"), ("ppo", "0")]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    write_text(tmp_path / "f", "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "f", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "old"
    with pytest.raises(UserError, match="cannot write"):
        RunRecord(tmp_path).write()
    assert not is_run(tmp_path)
