"""Sweeps: parents trained once, jobs side by side, what a kill leaves, the table, and the learning-rate range test."""

from __future__ import annotations

import csv
import fcntl
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest

from align import pipeline
from align.checkpoints.checkpoint import Checkpoint
from align.cli import dispatch as cli
from align.config.compose import compose
from align.report.axes import axis_over
from align.report.plots import Dot, Quantity, Series, plot, spans_decades
from align.sweeps.comparison import headline
from align.sweeps.page import charts, numeric_key, write_sweep_report
from align.sweeps.record import bring_up_to_date, row_of, varied_of
from align.sweeps.sweep import in_common, stage_keys
from align.sweeps.table import as_csv, as_text, short
from align.training.lr_range import finding
from data_prep.core.errors import TrainingStopped
from tests.tiny_chain import HOME, pipeline_words, read, refused, run

CHAIN = ["sft", "reward_model", "ppo", "evaluate"]
FEWER = ["stages.ppo.updates=1", "stages.ppo.critic_warmup=0", "stages.evaluate.prompts=3"]
GRID = [*FEWER, "adapter=lora,vera", "stages.ppo.kl_coef=0.02,0.05"]


def sweep(capfd, *words: str) -> tuple[int, str]:
    """(exit code, standard error) of `align run -m`."""
    return run(capfd, "-m", *words)


def two_stages() -> list[str]:
    """Overrides of a sweep over reward models on one SFT, the shortest that has a parent in common."""
    later = ("stages.ppo.", "stages.evaluate.")
    short = [word for word in pipeline_words("rlhf") if not word.startswith(later)]
    return [*short, "~stages.ppo", "~stages.evaluate", "stages.reward_model.lr=1e-3,2e-3"]


@cache
def grid() -> Path:
    """A finished sweep of four RLHF jobs; never to be changed in place."""
    assert cli.main(["run", "-m", *pipeline_words("rlhf"), *GRID, f"out={HOME / 'sweeps'}", "name=grid", "--json"]) == 0
    return HOME / "sweeps" / "grid"


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(grid(), tmp_path / "grid"))


def again(capfd, folder: Path, *more: str) -> tuple[int, str]:
    """The command of `grid` in another place."""
    return sweep(capfd, *pipeline_words("rlhf"), *GRID, f"out={folder.parent}", f"name={folder.name}", *more)


def entries(folder: Path) -> list[list[dict]]:
    return [read(folder / "jobs" / str(number) / "run.json")["stages"] for number in range(4)]


# -------------------------------------------------------------------------------------------- what jobs have in common
def test_parents_in_common_are_trained_once():
    record = read(grid() / "sweep.json")
    assert record["status"] == "done" and [job["status"] for job in record["jobs"]] == ["done"] * 4
    told = [(each["stage"], each["used_by"], each["adapter"]) for each in record["shared"]]
    assert told == [
        ("sft", [0, 1], "lora"),
        ("reward_model", [0, 1], "lora"),
        ("sft", [2, 3], "vera"),
        ("reward_model", [2, 3], "vera"),
    ]
    trained = [entry["name"] for job in entries(grid()) for entry in job if not entry["skipped"]]
    assert sorted(trained) == sorted([*CHAIN, "ppo", "evaluate"] * 2)
    for each in record["shared"]:
        folder = grid() / each["dir"]
        assert folder.parent == grid() / "shared" and folder.name.startswith(f"{each['stage']}-")
        assert Checkpoint.open(folder).digest == each["digest"] and each["seconds"] > 0
    own = {path.name for number in range(4) for path in (grid() / "jobs" / str(number)).iterdir() if path.is_dir()}
    assert own == {"ppo", "evaluate"}
    assert not [path for path in grid().rglob(".staging*")] and not (grid() / "multirun.yaml").exists()


def test_readers_find_a_shared_stage(capfd, tmp_path):
    """Also after the whole sweep was moved: every path in it is relative."""
    folder, digest = copied(tmp_path), entries(grid())[1][0]["digest"]
    hidden = grid().rename(HOME / "sweeps" / "away")
    try:
        for words in (["verify", "grid/jobs/1"], ["verify", "grid/jobs/1/sft"], ["lineage", "grid/jobs/1/ppo"]):
            capfd.readouterr()
            assert cli.main([*words, f"out={tmp_path}", "--json"]) == 0
            answer = json.loads(capfd.readouterr().out)
            assert answer.get("ok", True)
        assert digest in {node["digest"] for node in answer["nodes"]}
        capfd.readouterr()
        words = ["eval", "grid/jobs/1/sft", f"out={tmp_path}", "stages.evaluate.prompts=4"]
        assert cli.main([*words, "stages.evaluate.max_new_tokens=4", "--json"]) == 0
        assert list(json.loads(capfd.readouterr().out)["stages"]) == ["base", "sft"]
    finally:
        hidden.rename(grid())
    page = (folder / "jobs" / "1" / "report.html").read_text("utf-8")
    assert digest[:8] in page


def test_a_changed_shared_file_is_seen(capfd, tmp_path):
    folder = copied(tmp_path)
    file = folder / read(folder / "sweep.json")["shared"][0]["dir"] / "adapter_model.safetensors"
    held = file.read_bytes()
    file.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    code, err = again(capfd, folder)
    assert code == 2 and "content changed" in err and "Traceback" not in err
    record = read(folder / "sweep.json")
    assert [job["status"] for job in record["jobs"]] == ["failed", "failed", "done", "done"]


@pytest.mark.parametrize(
    ("swept", "shared"),
    [
        (["stages.evaluate.prompts=5,6"], ["sft", "reward_model", "ppo"]),
        (["stages.reward_model.lr=1e-3,2e-3"], ["sft"]),
        (["stages.sft.max_steps=2,3"], []),
        (["seed=0,1"], []),
        (["seed=0,0"], CHAIN),
    ],
)
def test_what_jobs_have_in_common_follows_from_their_configuration(swept, shared):
    key, _, values = swept[0].partition("=")
    configs = [compose(pipeline_words("rlhf", f"{key}={value}")) for value in values.split(",")]
    assert [each["stage"] for each in in_common(configs)] == shared
    assert list(stage_keys(configs[0])) == CHAIN


# ----------------------------------------------------------------------------------------------- going on after a stop
def test_the_same_command_trains_nothing(capfd, tmp_path, monkeypatch):
    from transformers import PreTrainedModel

    folder = copied(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    rows = read(folder / "sweep.json")["rows"]
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    code, err = again(capfd, folder)
    assert code == 0, err
    assert all(entry["skipped"] for job in entries(folder) for entry in job)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before
    assert read(folder / "sweep.json")["rows"] == rows


def test_ctrl_c_leaves_a_record_and_the_same_command_does_the_rest(capfd, tmp_path, monkeypatch):
    train, begun = pipeline._train, []

    def interrupted(work, plan, *rest):
        begun.append((Path(work.folder).name, plan.spec.name))
        if len(begun) == 2:
            raise KeyboardInterrupt
        return train(work, plan, *rest)

    words = [*pipeline_words("sft"), "stages.sft.lr=1e-3,2e-3,3e-3", f"out={tmp_path}", "name=s"]
    words.append("hydra.sweeper.max_batch_size=1")  # Hydra's own options pass through
    monkeypatch.setattr(pipeline, "_train", interrupted)
    code, err = sweep(capfd, *words)
    assert code == 130 and "Traceback" not in err
    record = read(tmp_path / "s" / "sweep.json")
    assert record["status"] == "stopped" and [job["status"] for job in record["jobs"]] == ["done", "stopped", "pending"]
    assert [row["status"] for row in record["rows"]] == ["done", "stopped", "pending"]
    assert "stopped" in (tmp_path / "s" / "report.html").read_text("utf-8")
    begun.clear()
    monkeypatch.setattr(pipeline, "_train", lambda work, *rest: begun.append(work.folder.name) or train(work, *rest))
    assert sweep(capfd, *words)[0] == 0
    assert begun == ["1", "2"]
    assert read(tmp_path / "s" / "sweep.json")["status"] == "done"


def test_a_killed_sweep_goes_on(capfd, tmp_path):
    """A real SIGKILL while the second job is at work; what the first one shared and made is kept."""
    words = [*two_stages(), f"out={tmp_path}", "name=k"]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "align.cli", "run", "-m", *words]
    with subprocess.Popen(command, env=paths, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if (tmp_path / "k" / "jobs" / "1.json").is_file():
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    record = read(tmp_path / "k" / "sweep.json")
    assert record["status"] == "running" and record["jobs"][0]["status"] == "done"
    digests = {entry["name"]: entry["digest"] for entry in read(tmp_path / "k" / "jobs" / "0" / "run.json")["stages"]}
    assert sweep(capfd, *words)[0] == 0
    record = read(tmp_path / "k" / "sweep.json")
    assert [job["status"] for job in record["jobs"]] == ["done", "done"] and record["status"] == "done"
    first, second = (read(tmp_path / "k" / "jobs" / number / "run.json")["stages"] for number in "01")
    assert all(entry["skipped"] for entry in first)
    assert second[0]["skipped"]
    assert {entry["name"]: entry["digest"] for entry in first} == digests


def test_a_shared_stage_that_fails_is_not_published(capfd, tmp_path, monkeypatch):
    from align.stages.sft import SFT

    def fail(self, context):
        (context.staging / "half").write_text("x", encoding="utf-8")
        raise TrainingStopped("loss is NaN")

    words = [*pipeline_words("rlhf"), "stages.ppo.kl_coef=0.02,0.05", f"out={tmp_path}", "name=f"]
    with monkeypatch.context() as patch:
        patch.setattr(SFT, "run", fail)
        code, err = sweep(capfd, *words)
    assert code == 3 and err.count("job 1: loss is NaN") == 1
    record = read(tmp_path / "f" / "sweep.json")
    assert record["status"] == "failed" and [job["exit_code"] for job in record["jobs"]] == [3, 3]
    assert record["shared"][0]["dir"] is None
    assert [path.name[:12] for path in (tmp_path / "f" / "shared").iterdir() if path.is_dir()] == [".staging-sft"]
    page = (tmp_path / "f" / "report.html").read_text("utf-8")
    assert "loss is NaN" in page and "0 of 2 jobs done, 2 failed" in page


def test_two_sweeps_on_one_folder(capfd, tmp_path):
    (tmp_path / "s").mkdir()
    with (tmp_path / "s" / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        code, err = sweep(capfd, *pipeline_words("sft"), "seed=0,1", f"out={tmp_path}", "name=s")
    assert "another process" in refused(code, err)
    assert not (tmp_path / "s" / "sweep.json").exists()


# -------------------------------------------------------------------------------------------------------- side by side
@pytest.mark.skipif(importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is None, reason="needs [sweep]")
def test_joblib_runs_jobs_side_by_side(tmp_path):
    """Two processes that need the same parents: one trains them, the other waits; each has half of the cores."""
    words = [*two_stages(), f"out={tmp_path}", "name=j"]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    paths.pop("OMP_NUM_THREADS", None)
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    command = [sys.executable, "-m", "align.cli", "run", "-m", *words, *launcher]
    done = subprocess.run(command, env=paths, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    record = read(tmp_path / "j" / "sweep.json")
    assert record["status"] == "done"
    both = [entry for number in "01" for entry in read(tmp_path / "j" / "jobs" / number / "run.json")["stages"]]
    assert sorted(entry["name"] for entry in both if not entry["skipped"]) == ["reward_model", "reward_model", "sft"]
    for number in "01":
        assert "reward_model: done" in (tmp_path / "j" / "jobs" / f"{number}.log").read_text("utf-8")
    assert {job["threads"] for job in record["jobs"]} == {max(1, len(os.sched_getaffinity(0)) // 2)}
    assert done.stdout.split("job ", 1)[1].split()[0] == "lr" and "Traceback" not in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs hydra-submitit-launcher")
@pytest.mark.parametrize("tasks", [1, pytest.param(2, marks=pytest.mark.grid)])
def test_submitit_runs_jobs_as_a_cluster_would(tasks, tmp_path):
    """Its local form starts each job as Slurm would: from a pickled call, in a process of its own for each task."""
    lrs = "1e-3,2e-3" if tasks == 1 else "1e-3"
    words = [*pipeline_words("sft"), f"stages.sft.lr={lrs}", f"out={tmp_path}", "name=s"]
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=20", "hydra.launcher.cpus_per_task=1"]
    launcher.append(f"hydra.launcher.tasks_per_node={tasks}")
    command = [sys.executable, "-m", "align.cli", "run", "-m", *words, *launcher]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=paths, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    record, jobs = read(tmp_path / "s" / "sweep.json"), tmp_path / "s" / "jobs"
    assert record["status"] == "done" and {job["status"] for job in record["jobs"]} == {"done"}
    for job in record["jobs"]:
        said = (jobs / f"{job['number']}.log").read_text("utf-8")
        assert said.count("sft: done") == 1 and "waiting for it" not in said
        others = [path.read_text("utf-8") for path in jobs.glob(f"{job['number']}.*.log")]
        assert len(others) == tasks - 1, "each task has a log"
        assert not any("sft: " in other for other in others), "one of them publishes, the others help"


# ------------------------------------------------------------------------------------------------- rows, table, report
def test_the_table_says_everything(capfd):
    record = read(grid() / "sweep.json")
    text = (grid() / "table.txt").read_text("utf-8")
    assert [line.split()[:3] for line in text.splitlines()[1:5]] == [
        ["0", "lora", "0.02"], ["1", "lora", "0.05"], ["2", "vera", "0.02"], ["3", "vera", "0.05"]
    ]  # fmt: skip
    assert "shared sft (lora): trained once" in text
    rows = list(csv.DictReader((grid() / "table.csv").open(encoding="utf-8")))
    assert [row["stages.ppo.kl_coef"] for row in rows] == ["0.02", "0.05"] * 2
    for row, kept, job in zip(rows, record["rows"], entries(grid()), strict=True):
        ppo = job[2]
        assert int(row["trainable"]) == kept["trainable"] == ppo["trainable"]
        assert float(row["share"]) == pytest.approx(ppo["trainable"] / ppo["total"])
        assert int(row["peak_rss_bytes"]) == max(entry["peak_rss_bytes"] for entry in job)
        assert float(row["seconds"]) == pytest.approx(ppo["seconds"] + job[3]["seconds"])
        assert float(row["shared_seconds"]) == pytest.approx(job[0]["seconds"] + job[1]["seconds"])
        assert float(row["kl"]) == ppo["metrics"]["objective/kl_k1"] == float(row["ppo.objective/kl_k1"])
        assert float(row["accuracy"]) == job[1]["metrics"]["accuracy"] and row["status"] == "done"
    page = (grid() / "report.html").read_text("utf-8")
    assert len(page) < 1_000_000 and page.count("<svg") >= 2 and "http" not in page.replace("http-equiv", "")
    assert 'href="jobs/3/report.html"' in page


def rows_of(**columns: list) -> list[dict]:
    """Rows with these columns; `gold` is a metric, all others vary."""
    made = []
    for i in range(len(next(iter(columns.values())))):
        varied = {key: held[i] for key, held in columns.items() if key != "gold"}
        metrics = {"gold": columns["gold"][i], "gold_se": 0.01} if columns["gold"][i] is not None else {}
        made.append({"job": i, "status": "done" if metrics else "failed", "error": None, "varied": varied})
        made[-1] |= {"metrics": metrics, "trainable": 10, "total": 100, "share": 0.1, "peak_rss_bytes": 2**20}
        made[-1] |= {"weights_bytes": 40, "tokens_per_second": None, "seconds": 1.0, "shared_seconds": 0.0, "every": {}}
    return made


def record_of(rows: list[dict]) -> dict:
    return {"rows": rows, "shared": [], "status": "done"}


def test_a_narrow_terminal_gets_a_block_for_each_job():
    record = record_of(rows_of(adapter=["lora", "vera"], gold=[0.5, 0.75]))
    assert max(map(len, as_text(record).splitlines())) > 40
    narrow = as_text(record, 40)
    assert max(map(len, narrow.splitlines())) <= 40
    assert narrow.count("adapter") == 2 and "0.75" in narrow
    assert len(list(csv.reader(as_csv(record).splitlines()))) == 3


def test_ls_knows_sweeps(capfd):
    grid()
    capfd.readouterr()
    assert cli.main(["ls", "runs", f"out={HOME / 'sweeps'}"]) == 0
    assert "grid  sweep done: 4 done" in capfd.readouterr().out


def test_keys_are_as_short_as_they_can_be():
    keys = ["stages.ppo.lr", "stages.sft.lr", "stages.ppo.kl_coef", "adapter"]
    assert list(short(keys).values()) == ["ppo.lr", "sft.lr", "kl_coef", "adapter"]
    jobs = [{"overrides": ["seed=0", "adapter=lora", "x=1e-3"]}, {"overrides": ["seed=0", "adapter=vera", "x=2"]}]
    assert varied_of(jobs) == [{"adapter": "lora", "x": 0.001}, {"adapter": "vera", "x": 2}]


def test_what_is_drawn_follows_from_what_varies():
    numeric = rows_of(adapter=["lora", "lora", "vera"], lr=[1e-4, 1e-2, 1e-3], seed=[0, 1, 2], gold=[0.5, 0.6, None])
    assert numeric_key(numeric) == "lr"
    (chart,) = charts(numeric)
    assert chart["title"] == "gold over lr" and chart["drawing"].count("<title>") == 2
    assert [name for _, name in chart["legend"]] == []  # vera failed: one series is left
    assert charts(rows_of(adapter=["lora", "vera"], gold=[0.5, 0.6]))[0]["title"] == "gold by setting"
    best = headline(record_of(rows_of(adapter=["lora", "vera", "full"], gold=[0.5, 0.61, 0.6])))
    assert best["title"] == "Best gold: 0.61, with vera."
    assert best["sentences"] == ["3 of 3 jobs done.", "Not clearly better than job 2: the 95 % intervals overlap."]
    tied = headline(record_of(rows_of(adapter=["lora", "vera", "full"], gold=[0.6, 0.6, 0.6])))
    assert tied["title"] == "No single best: gold is 0.60 in 3 of 3 jobs." and "3 of 3" in tied["sentences"][0]
    pair = headline(record_of(rows_of(adapter=["lora", "vera", "full"], gold=[0.6, 0.59, 0.6])))
    assert pair["title"] == "No single best: gold is 0.60 in 2 of 3 jobs." and "than job 1:" in pair["sentences"][1]


def test_plots_place_values_where_they_belong():
    axis = axis_over([1e-3, 1.0], 0.0, 100.0, log=True)
    marks, low, high = list(axis.marks), axis.low, axis.high
    assert marks == pytest.approx([1e-3, 1e-2, 1e-1, 1.0]) and low < -3 and high > 0
    assert spans_decades([1, 10]) and not spans_decades([1, 9]) and not spans_decades([0, 10])
    along = Quantity("x", log=True)
    drawing = plot([Series("a", [Dot(1, 1, title="<b>"), Dot(100, 3)])], along, Quantity("y"), "a plot")
    assert "&lt;b&gt;" in drawing and drawing.count('class="s0 dot"') == 2
    a, b = (float(part.split(",")[0]) for part in drawing.split('points="')[1].split('"')[0].split(" "))
    middle = plot([Series("a", [Dot(1, 1), Dot(10, 2), Dot(100, 3)])], along, Quantity("y"), "a plot")
    points = middle.split('points="')[1].split('"')[0].split(" ")
    assert float(points[1].split(",")[0]) == pytest.approx((a + b) / 2, abs=0.2)


def test_a_report_of_damaged_jobs(tmp_path):
    folder = copied(tmp_path)
    (folder / "jobs" / "0" / "run.json").write_text("{", encoding="utf-8")
    shutil.rmtree(folder / "jobs" / "1")
    _, record = bring_up_to_date(folder)
    assert [row["trainable"] is None for row in record["rows"]] == [True, True, False, False]
    assert write_sweep_report(folder).stat().st_size > 1000
    assert row_of(folder, {"number": 9, "dir": "jobs/9", "status": "pending"})["metrics"] == {}


# ----------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["seed=range(0,0)"], "names no value, so there is no job"),
        (["seed=interval(0,1)"], "has no list of values"),
        (["seed="], "expected a whole number"),
        (["hydra/launcher=joblob", "seed=0,1"], "not installed: 'joblob'"),
        (["stages.sft.lr=1e-4,abc"], "expected a number (got 'abc')"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(words, told, capfd, tmp_path):
    code, err = sweep(capfd, *pipeline_words("sft"), *words, f"out={tmp_path}")
    assert told in refused(code, err)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------- learning-rate range test
def test_the_suggestion_is_a_tenth_of_where_training_diverged():
    rates = [10.0 ** (-4 + 4 * i / 99) for i in range(100)]
    fall = [2.0 / (1.0 + rate / 1e-2) + 0.02 * (-1) ** i for i, rate in enumerate(rates)]
    found = finding(rates[:90], fall[:90], 100)
    assert found.diverged and found.suggestion == pytest.approx(rates[89] / 10)
    found = finding(rates, fall, 100)
    assert not found.diverged and found.suggestion == pytest.approx(rates[99] / 10)
    flat = [2.0 + 0.02 * (-1) ** i for i in range(100)]
    assert finding(rates, flat, 100).suggestion is None


def test_a_range_test_rises_stops_and_suggests(tmp_path, capfd):
    """The rate rises by equal factors from low to high times the method's own; nothing is saved to stand on."""
    words = ["experiment=lr_range", f"out={tmp_path}", "name=r", "data.conversations.limit=400"]
    more = [f"stages.lr_range.{option}" for option in ("max_steps=40", "batch_size=8", "low=0.05", "high=500")]
    capfd.readouterr()
    assert cli.main(["run", *words, *more]) == 0
    out = capfd.readouterr().out
    result = read(tmp_path / "r" / "lr_range" / "result.json")
    rates = result["lrs"]
    assert rates[0] == pytest.approx(0.05 * 2e-3)  # the method's usual rate on this model is 2e-3
    assert rates[1] / rates[0] == pytest.approx(1e4 ** (1 / 39))
    assert len(rates) == len(result["losses"]) == len(result["smoothed"])
    assert len(rates) < 40 and result["diverged"] is True
    assert result["suggestion"] == pytest.approx(rates[-1] / 10)
    assert not (tmp_path / "r" / "lr_range" / "checkpoint.json").exists()
    mantissa, exponent = result["override"].removeprefix("stages.sft.lr=").split("e")
    assert float(mantissa) * 10.0 ** int(exponent) == pytest.approx(result["suggestion"], rel=0.05)
    assert result["override"] in out and result["headline"] in " ".join(out.split())
    assert "Loss over the learning rate" in (tmp_path / "r" / "report.html").read_text("utf-8")


def test_a_range_that_does_not_rise(capfd, tmp_path):
    words = [*pipeline_words("lr_range"), "stages.lr_range.low=10", "stages.lr_range.high=1", f"out={tmp_path}"]
    assert "stages.lr_range.low: must be below" in refused(*run(capfd, *words))
