"""Trackers: what arrives in the real ones, and that none of them can disturb a run."""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from align.cli import dispatch as cli
from align.config.compose import compose
from align.config.registries import trackers
from align.planning.preflight import check_sources
from align.run_record import RunRecord
from align.tracking import processes as tracks_module
from align.tracking.metrics import Metrics
from align.tracking.processes import TrackerPool
from data_prep.core.errors import UserError
from tests.align.tracking.fake_trackers import HangsAtOnce, Recorder
from tests.tiny_chain import checkpoint, execute, pipeline_words, read, sft, until

STAGES = ["sft", "reward_model", "ppo"]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """The run folder of a whole tiny chain that told every real tracker."""
    out = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_DATA_DIR"):
            patch.delenv(name, raising=False)
        patch.setenv("TRACKIO_DIR", str(out / "trackio"))
        patch.setenv("TRACKIO_SPACE_ID", "somebody/space")  # never used unless tracking.mode=online
        options = ["tracking.to=[wandb,tensorboard,trackio]", "tracking.group=tests", "tracking.tags=[a]"]
        config = compose([*pipeline_words("rlhf", *options, "tracking.wait=120"), f"out={out}"])
        record = execute(config)
    assert [(entry["name"], entry["status"], entry["dropped"]) for entry in record["tracking"]] == [
        ("wandb", "done", 0),
        ("tensorboard", "done", 0),
        ("trackio", "done", 0),
    ]
    return out / config.name


def logged(folder):
    """{'sft/train/loss': [(step, value), ...]} of all metrics.jsonl of a run."""
    found = {}
    for path in sorted(folder.glob("*/metrics.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            stage, step, split = row.pop("stage"), row.pop("step"), row.pop("split")
            for key, value in row.items():
                found.setdefault(f"{stage}/{split}/{key}", []).append((step, value))
    assert {f"{stage}/train" for stage in STAGES} <= {"/".join(key.split("/")[:2]) for key in found}
    return found


def wandb_records(path):
    """The records of a `.wandb` file: LevelDB log frames (32 KiB blocks) around the package's own messages."""
    from wandb.proto import wandb_internal_pb2

    data, at, held = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        held, at = held + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(held)
            held = b""
            yield record


def items_of(items):
    """Key -> value of the (nested) JSON items of a record."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.fixture(scope="module")
def sent(tracked):
    """What the offline file of wandb holds, by kind of record."""
    (path,) = tracked.glob("tracking/wandb/offline-run-*/*.wandb")
    found = {}
    for record in wandb_records(path):
        kind = record.WhichOneof("record_type")
        found.setdefault(kind, []).append(getattr(record, kind))
    return found


def test_wandb_holds_the_recipe_and_every_metric(tracked, sent):
    run = sent["run"][0]
    config = items_of(run.config.update)
    recipe = compose([*pipeline_words("rlhf")]).resolved
    assert {key: config[key] for key in ("pipeline", "model", "stages")} == {
        key: recipe[key] for key in ("pipeline", "model", "stages")
    }
    assert (run.project, run.run_group, list(run.tags)) == ("align", "tests", ["a"])
    assert run.display_name == f"tests-{tracked.name}"
    steps = {metric.glob_name: metric.step_metric for metric in sent["metric"] if metric.glob_name}
    assert {f"{stage}/*": f"{stage}/step" for stage in STAGES}.items() <= steps.items()
    rows = [items_of(history.item) for history in sent["history"]]
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    for key, points in logged(tracked).items():
        stage = key.split("/")[0]
        assert [(row[f"{stage}/step"], row[key]) for row in rows if key in row] == points, key


def test_wandb_holds_summary_samples_and_status(tracked, sent):
    summary = {}
    for record in sent["summary"]:
        summary.update(items_of(record.update))
    for entry in read(tracked / "run.json")["stages"][:3]:
        for key, value in entry["metrics"].items():
            if isinstance(value, float):
                assert summary[f"{entry['name']}/final/{key}"] == value
    assert summary["status"] == "done" and sent["exit"][0].exit_code == 0
    assert summary["sft/samples/nrows"] == len((tracked / "sft/samples.jsonl").read_text().splitlines())


def test_wandb_holds_checkpoints_with_their_lineage(tracked, sent):
    made = {name: checkpoint(tracked, name) for name in STAGES}
    models = [item for item in sent["artifact"] if item.type == "model"]
    outputs = {item.name: item for item in models if not item.use_after_commit}
    inputs = {item.name: item for item in models if item.use_after_commit}
    names = {stage: f"{stage}-{found.digest[:12]}" for stage, found in made.items()}
    assert set(outputs) == set(names.values())
    assert set(inputs) == {names["sft"], names["reward_model"]}, "what reward model and PPO stand on"
    for stage, found in made.items():
        artifact = outputs[names[stage]]
        metadata = json.loads(artifact.metadata)
        assert metadata["digest"] == found.digest
        assert metadata["parents"] == [{"role": p.role, "digest": p.digest} for p in found.parents()]
        assert metadata["base"]["fingerprint"] == found.record["base"]["fingerprint"]
        assert metadata["method"] == "lora"
        assert {item.path for item in artifact.manifest.contents} == {"checkpoint.json", *found.record["files"]}
        assert all(Path(item.local_path).is_file() for item in artifact.manifest.contents)
    for name, artifact in inputs.items():
        assert artifact.digest == outputs[name].digest, "equal content: wandb sees one artifact"


def test_tensorboard_holds_every_metric(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked / "tracking/tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    for key, points in logged(tracked).items():
        found = [(event.step, event.value) for event in events.Scalars(key)]
        assert [step for step, _ in found] == [step for step, _ in points], key
        assert [value for _, value in found] == pytest.approx([value for _, value in points], rel=1e-6)
    text = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert '"pipeline": "rlhf"' in text["recipe"] and text["status"] == "done"
    assert text["sft/samples"].splitlines()[0].startswith("| id | features | prompt |")
    assert "sft/final/eval_loss" in events.Tags()["scalars"]


def test_trackio_holds_every_metric(tracked):
    code = """
import json, trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs("align")
print(json.dumps([run.name, run.config, SQLiteStorage.get_logs("align", run.name)]))
"""
    environment = {**os.environ, "TRACKIO_DIR": str(tracked.parent / "trackio")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    name, config, rows = json.loads(done.stdout.splitlines()[-1])
    assert name.startswith(f"tests-{tracked.name}-")
    assert config["pipeline"] == "rlhf" and config["tags"] == ["a"]
    for key, points in logged(tracked).items():
        stage = key.split("/")[0]
        assert [(row[f"{stage}/step"], row[key]) for row in rows if key in row] == points, key
    assert any("sft/samples" in row for row in rows)


def test_trackers_change_neither_the_name_nor_the_result():
    plain, told = compose(sft(Path("x"))), compose(sft(Path("x"), "tracking.to=[wandb]", "tracking.project=p"))
    assert (plain.digest, plain.stages) == (told.digest, told.stages)
    assert told.tracking.to == ["wandb"] and told.resolved["tracking"]["project"] == "p"


def refusal(*words):
    with pytest.raises(UserError) as caught:
        check_sources(compose(["pipeline=sft", *words]))
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_mistakes_are_one_line(monkeypatch):
    assert "tracking.to: unknown tracker 'wandbb' (did you mean 'wandb'?" in refusal("tracking.to=[wandbb]")
    assert "tracking.too: unknown option (did you mean 'tracking.to'?)" in refusal("tracking.too=[wandb]")
    assert "tracking.mode: unknown choice 'onlin' (did you mean 'online'?" in refusal("tracking.mode=onlin")
    assert "tracking.to: expected a list [a,b] (got 'wandb')" in refusal("tracking.to=wandb")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else found(name, *more)
    )
    line = refusal("tracking.to=[tensorboard,wandb]")
    assert "needs the package 'wandb', which is not installed; in the clone: pip install -e '.[wandb]'" in line


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(trackers, "_choices", {**dict(trackers.items()), "recorder": Recorder, "second": Recorder})


def started(folder, *words, names="[recorder]"):
    """Trackers of a made-up run in `folder`, started, and the record of the run."""
    folder.mkdir(exist_ok=True)
    record = RunRecord(folder)
    words = ("tracking.wait=240", *words)  # a limit that only catches a hang, unless a test sets its own
    found = TrackerPool(compose(["pipeline=sft", f"tracking.to={names}", "name=run", *words]), folder, record)
    found.start()
    return found, record


def calls(folder):
    return [json.loads(line) for line in (folder / "tracking/calls.jsonl").read_text().splitlines()]


ENTRY = {"name": "sft", "digest": "d1", "skipped": False, "metrics": {"loss": 1.0, "worst": {"x": 2}, "ids": [1]}}


def test_events_arrive_in_order_and_a_second_call_goes_on(recorder, tmp_path):
    metrics = tmp_path / "sft" / "metrics.jsonl"
    found, record = started(tmp_path)
    rows = Metrics(metrics, "sft", found.row)
    rows.log(1, "train", {"loss": 3.0})
    rows.log(1, "eval", {"loss": 2.0})
    found.stage_done(ENTRY, metrics.parent)
    found.finish("done")
    (entry,) = record.tracking
    first = [["start", "run", entry["id"], False], ["log", "sft", 1, "train", {"loss": 3.0}]]
    first += [["log", "sft", 1, "eval", {"loss": 2.0}]]
    first += [["stage", "sft", {"sft/final/loss": 1.0, "sft/final/worst/x": 2.0}], ["finish", "done"]]
    assert calls(tmp_path) == first
    assert (entry["status"], entry["dropped"], entry["stages"]) == ("done", 0, ["d1"])

    (tmp_path / "run.json").write_text(json.dumps(record.as_dict()))
    found, again = started(tmp_path, names="[recorder,second]")
    found.stage_done({**ENTRY, "skipped": True}, metrics.parent)
    found.finish("done")
    later = calls(tmp_path)[len(first) :]
    assert ["start", "run", entry["id"], True] in later, "the same run goes on"
    assert [call for call in later if call[0] in ("log", "stage")] == first[1:4], "the new tracker alone gets it all"
    assert [track["stages"] for track in again.tracking] == [["d1"], ["d1"]]


@pytest.mark.parametrize("fault", ["raises", "full", "exits", "dies"])
@pytest.mark.parametrize("call", ["start", "log", "stage", "finish"])
def test_a_tracker_that_fails_is_left_out_with_one_warning(recorder, tmp_path, capfd, fault, call):
    found, record = started(tmp_path, f"tracking.tags=[{fault}-{call}]")
    rows = Metrics(tmp_path / "metrics.jsonl", "sft", found.row)
    for step in range(50):
        rows.log(step, "train", {"loss": 1.0})
    found.stage_done(ENTRY, tmp_path)
    found.finish("done")
    entry, err = record.tracking[0], capfd.readouterr().err
    assert entry["status"] == "failed"
    assert entry["error"] in {
        "raises": ["RuntimeError: broken on two lines"],
        "full": ["OSError: [Errno 28] No space left on device"],
    }.get(fault, ["its process ended"])
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 50
    warnings, closing = err.splitlines()[:-1], err.splitlines()[-1]
    assert warnings == [f"align: tracking: recorder failed and is left out: {entry['error']}"]
    assert closing.startswith("tracking: recorder failed")


@pytest.mark.parametrize("call", ["start", "log", "finish"])
def test_a_tracker_that_hangs_is_left_behind(recorder, tmp_path, capfd, monkeypatch, call):
    waits = []

    class Watched(queue.Queue):
        def put(self, item, block=True, timeout=None):
            waits.extend([timeout] if block else [])
            super().put(item, block, timeout)

    monkeypatch.setattr(tracks_module, "queue", SimpleNamespace(Queue=Watched, Full=queue.Full))
    monkeypatch.setattr(tracks_module, "WAITING", 3)
    found, record = started(tmp_path, f"tracking.tags=[hangs-{call}]", "tracking.wait=1.5")
    rows = Metrics(tmp_path / "metrics.jsonl", "sft", found.row)
    for step in range(300):
        rows.log(step, "train", {f"number {i}": 1.0 for i in range(60)})
    assert not waits, "training does not wait"
    assert found.tracks[0].process.poll() is None, "the tracker still hangs"
    found.finish("done")  # waits for the time that is set, or this test would end as a hang
    assert all(timeout <= 1.5 for timeout in waits)
    entry, err = record.tracking[0], capfd.readouterr().err
    assert entry["status"] == "abandoned"
    assert found.tracks[0].process.poll() == -signal.SIGKILL
    assert "recorder did not finish in time and is left behind" in err
    assert err.count("recorder does not keep up; rows are dropped") == (entry["dropped"] > 0)
    if call != "finish":
        assert entry["dropped"] > 0
        assert f"tracking: recorder abandoned, {entry['dropped']} rows dropped" in err


SCRIPT = """
import sys, time
from pathlib import Path
from tests.align.tracking.fake_trackers import HangsAtOnce, Recorder
from align.config.compose import compose
from align.config.registries import trackers
from align.run_record import RunRecord
from align.tracking.processes import TrackerPool
trackers.register("recorder")(Recorder)
folder, tag, wait = sys.argv[1:]
words = ["pipeline=sft", "tracking.to=[recorder]", f"tracking.tags=[{tag}]", f"tracking.wait={wait}", "name=run"]
tracks = TrackerPool(compose(words), Path(folder), RunRecord(Path(folder)))
tracks.start()
tracks.row({"stage": "sft", "step": 1, "split": "train", "loss": 1.0})
print(tracks.tracks[0].process.pid, flush=True)
sys.stdin.readline()
"""


def script(tmp_path, tag, wait):
    """A run with a tracker; it prints the tracker's process and ends at the end of its own input."""
    root = Path(__file__).resolve().parents[3]
    words = [sys.executable, "-c", SCRIPT, str(tmp_path), tag, str(wait)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z"
    except OSError:
        return True


def test_a_run_that_is_killed_is_told_as_failed(tmp_path):
    run = script(tmp_path, "", 240)
    pid = int(run.stdout.readline())
    path = tmp_path / "tracking/calls.jsonl"
    assert until(lambda: path.is_file() and len(path.read_text().splitlines()) == 2)
    run.kill()
    run.wait()
    assert until(lambda: gone(pid))
    assert calls(tmp_path)[-1] == ["finish", "failed"]


@pytest.mark.parametrize("call", ["start", "log", "finish"])
def test_the_interpreter_ends_whatever_a_tracker_does(tmp_path, call):
    run = script(tmp_path, f"hangs-{call}", 1)
    pid = int(run.stdout.readline())
    run.stdin.close()
    assert run.wait(timeout=240) == 0, "it does not wait for the tracker, which hangs for longer"
    assert until(lambda: gone(pid)), "nothing stays behind"


def test_a_tracker_that_begins_after_its_run_has_ended_ends_too():
    with subprocess.Popen([sys.executable, "-c", ""]) as run:
        pass
    hangs = f"{HangsAtOnce.__module__}:{HangsAtOnce.__qualname__}"
    command = [sys.executable, "-m", "align.tracking.trackers", hangs, "2", str(run.pid)]
    with subprocess.Popen(command, cwd=Path(__file__).resolve().parents[3], stdin=subprocess.PIPE) as tracker:
        try:
            assert tracker.wait(240) == 1
        finally:
            tracker.kill()


def test_a_run_ends_well_beside_trackers_that_fail_and_hang(recorder, tmp_path, capfd, monkeypatch):
    words = ["tracking.to=[recorder,second]", "tracking.wait=240", "tracking.tags=[raises-log,hangs-finish]"]
    record = execute(compose(sft(tmp_path, *words)))
    assert record["status"] == "done" and [entry["status"] for entry in record["stages"]] == ["done"]
    assert {entry["status"] for entry in record["tracking"]} == {"failed"}
    assert read(tmp_path / "n/run.json") == record
    capfd.readouterr()
    told, finish = tmp_path / "n/tracking/calls.jsonl", TrackerPool.finish
    before = told.read_text()

    def finish_once_told(self, *given):
        assert until(lambda: told.read_text() != before and calls(tmp_path / "n")[-1][0] == "stage")
        finish(self, *given)

    monkeypatch.setattr(TrackerPool, "finish", finish_once_told)
    again = execute(compose(sft(tmp_path, "tracking.to=[recorder]", "tracking.tags=[hangs-finish]", "tracking.wait=5")))
    assert again["stages"][0]["skipped"] is True, "what is tracked decides nothing"
    assert again["tracking"][0]["status"] == "abandoned"
    assert calls(tmp_path / "n")[-1][0] == "stage", "what it had not got before, it got now"
    assert "recorder abandoned" in capfd.readouterr().err


def test_a_run_that_is_refused_tells_no_tracker(recorder, tmp_path):
    with pytest.raises(UserError):
        execute(compose(sft(tmp_path, "tracking.to=[recorder]", "stages.sft.init=nowhere/sft")))
    assert not (tmp_path / "n").exists()


def test_every_job_of_a_sweep_is_a_run_of_its_own_in_the_sweep_s_group(recorder, tmp_path, capfd):
    words = ["run", "-m", *pipeline_words("sft", "adapter=lora,vera"), f"out={tmp_path}"]
    assert cli.main(words) == 0
    (folder,) = tmp_path.iterdir()
    assert cli.main([*words, "tracking.to=[recorder]"]) == 0
    assert [folder] == list(tmp_path.iterdir()), "what is tracked changes no sweep's name"
    told = [calls(folder / "jobs" / number) for number in "01"]
    assert [job[0][:2] for job in told] == [["start", f"{folder.name}-0"], ["start", f"{folder.name}-1"]]
    assert told[0][0][2] != told[1][0][2], "ids of their own"
    for number, job in zip("01", told, strict=True):
        rows = (folder / "jobs" / number / "sft" / "metrics.jsonl").read_text().splitlines()
        assert [call[0] for call in job] == ["start", *["log"] * len(rows), "stage", "finish"]
    capfd.readouterr()
