"""The command line: exit codes, one-line errors, one JSON object, sweeps."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from json import dumps

import pytest

from align import pipeline
from align.cli import dispatch as cli
from data_prep.core.errors import TrainingStopped, UserError


def run(capfd, *words):
    """(exit code, standard output, standard error) of a command."""
    capfd.readouterr()
    code = cli.main(list(words))
    out, err = capfd.readouterr()
    return code, out, err


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """Replace the pipeline by one that only writes down what it was asked to do; runs go below `tmp_path`."""
    configs = []

    def fake(config, shared=None):
        configs.append(config)
        print("a library prints to standard output")
        os.write(1, b"and so does compiled code\n")
        return {"status": "done", "name": config.name}

    monkeypatch.setattr(pipeline, "run", fake)
    monkeypatch.chdir(tmp_path)
    return configs


def test_help_lists_every_verb(capfd):
    code, out, _ = run(capfd, "--help")
    assert code == 0
    for verb in cli.VERBS:
        assert f"align {verb.name}" in out
    assert run(capfd)[1] == out


@pytest.mark.parametrize(("given", "found"), [(None, "1"), ("0", "0")])
def test_no_compiler_is_loaded_unless_it_is_asked_for(given, found, monkeypatch, capfd):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", given or "")
    if given is None:
        monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    assert run(capfd, "ls", "adapters")[0] == 0
    assert os.environ["TORCHDYNAMO_DISABLE"] == found


@pytest.mark.parametrize("verb", [verb.name for verb in cli.VERBS])
def test_help_of_a_verb(capfd, verb):
    code, out, _ = run(capfd, verb, "--help")
    assert code == 0 and out.startswith(f"align {verb}")


def test_help_of_run_explains_every_option(capfd):
    _, out, _ = run(capfd, "run", "--help")
    for line in ("adapter=vera", "stages.ppo.", "kl_coef", "rank r of the", "data.path", "--multirun"):
        assert line in out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["rnu"], "unknown verb 'rnu' (did you mean 'run'?"),
        (["generate", "RUN"], "there is no verb 'generate'; align chat TARGET answers, line by line"),
        (["run", "adapter=lorra"], "unknown adapter 'lorra' (did you mean 'lora'?"),
        (["run", "--jsn"], "unknown flag '--jsn'; did you mean '--json'?"),
        (["sft", "talk.jsonl"], "there is no verb 'sft'; it is a pipeline: align run pipeline=sft"),
        (["run", "--adapter", "lora"], "unknown flag '--adapter'; options are KEY=VALUE, without dashes"),
        (
            ["chat", "RUN", "--temperature", "0"],
            "'--temperature'; options have no dashes: temperature=VALUE",
        ),
        (["run", "talk.jsonl"], "talk.jsonl: no such file or folder"),
        (["run", "."], "'.' is a folder, and words are files; data=files data.path=."),
        (["run", "talk"], "'talk' is not an override; overrides are KEY=VALUE"),
        (["ls", "adaptors"], "unknown kind 'adaptors' (did you mean 'adapters'?"),
        (["ls", "runs", "otu=x"], "unknown option 'otu'; did you mean 'out'?"),
        (["verify"], "verify needs a TARGET"),
        (["lineage", "nothing"], "no run or checkpoint 'nothing'"),
        (["eval", "seed=1"], "eval needs a TARGET"),
        (["show", "persona"], "no run and no experiment 'persona'; did you mean 'persona_rlhf'?"),
        (["run", "--config-dir", "nowhere"], "--config-dir: no such folder: nowhere"),
        (["run", "pipeline=sft", "data=files", "data.path=no.jsonl"], "no.jsonl: no such file or folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_one_line_and_exit_code_2(capfd, tmp_path, monkeypatch, words, line):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capfd, *words)
    assert code == 2 and out == ""
    assert err.startswith("align: ") and line in err and err.count("\n") == 1
    code, out, _ = run(capfd, *words, "--json")
    assert code == 2
    assert set(json.loads(out)["error"]) == {"code", "message", "hint", "file", "row", "field"}
    assert not list(tmp_path.iterdir())


def test_json_is_the_only_thing_on_standard_output(capfd, ran):
    code, out, err = run(capfd, "run", "pipeline=sft", "--json")
    assert code == 0
    assert json.loads(out) == {"status": "done", "name": ran[0].name}
    assert "a library prints" in err and "compiled code" in err


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (UserError("no such base", field="model.path"), 2),
        (TrainingStopped("loss is NaN"), 3),
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device", "runs/x"), 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes(capfd, ran, monkeypatch, raised, code):
    def fail(config, shared=None):
        raise raised

    monkeypatch.setattr(pipeline, "run", fail)
    found, out, err = run(capfd, "run", "pipeline=sft")
    assert (found, out) == (code, "")
    assert err.splitlines()[-1].startswith("align: ")
    found, out, _ = run(capfd, "run", "pipeline=sft", "--json")
    assert found == code and json.loads(out)["error"]["message"]


def test_a_bug_keeps_its_traceback(capfd, ran, monkeypatch):
    def fail(config, shared=None):
        raise RuntimeError("broken")

    monkeypatch.setattr(pipeline, "run", fail)
    with pytest.raises(RuntimeError, match="broken"):
        cli.main(["run", "pipeline=sft"])
    code, out, err = run(capfd, "run", "pipeline=sft", "--json")
    assert code == 1 and json.loads(out)["error"]["code"] == "internal" and "Traceback" in err


def test_flags_may_stand_anywhere(capfd, ran):
    assert run(capfd, "run", "pipeline=sft", "--json", "seed=4")[0] == 0
    assert run(capfd, "--json", "run", "seed=4", "pipeline=sft")[0] == 0
    assert [config.seed for config in ran] == [4, 4]


def test_terminated_is_interrupted(tmp_path):
    script = (
        "import os, signal, sys\nfrom align import cli, pipeline\n"
        "pipeline.run = lambda config, json=False: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.exit(cli.main(['run', 'pipeline=sft']))\n"
    )
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=paths, capture_output=True, text=True, check=False)
    assert done.returncode == 130 and done.stderr.endswith("goes on with the first unfinished stage\n")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_ls(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capfd, "ls", "--json")
    names = {kind: [row["name"] for row in rows] for kind, rows in json.loads(out).items()}
    assert code == 0
    assert {"full", "lora", "qlora", "vera"} <= set(names["adapters"])
    assert {"sft", "reward_model", "ppo", "evaluate", "pretrain"} <= set(names["stages"])
    assert "model=nano" in names["models"] and "data=smalltalk" in names["data"] and names["runs"] == []
    _, out, _ = run(capfd, "ls", "adapters")
    assert re.search(r"rank \[16\]  rank r", out)


def test_ls_runs(capfd, tmp_path):
    for name, text in [
        ("good", json.dumps({"status": "done", "stages": [{"name": "sft", "status": "done"}]})),
        ("torn", "{"),
    ]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text, encoding="utf-8")
    _, out, _ = run(capfd, "ls", "runs", f"out={tmp_path}")
    assert "good  no method: The run is done." in out and "torn  unreadable run.json" in out


def test_show(capfd, tmp_path):
    code, out, _ = run(capfd, "show", "pipeline=sft", "stages.sft.lr=0.125")
    assert code == 0 and "lr: 0.125" in out
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.yaml").write_text("seed: 9\n", encoding="utf-8")
    assert run(capfd, "show", "mine", f"out={tmp_path}")[1] == "seed: 9\n"
    code, out, _ = run(capfd, "show", "persona_rlhf", "model.path=b", "data.root=d", "--json")
    assert code == 0 and json.loads(out)["recipe"]["stages"]["sft"]["data"]["root"] == "d"


def test_sweep_runs_every_combination(capfd, ran, tmp_path):
    words = [
        "pipeline=rlhf",
        "adapter=lora,vera",
        "stages.ppo.kl_coef=0.02,0.05",
        "stages.sft.adapter=vera",
        "name=grid",
    ]
    code, out, _ = run(capfd, "run", "-m", *words, "--json")
    record = json.loads(out)
    assert code == 0 and record["status"] == "done"
    assert [job["dir"] for job in record["jobs"]] == [f"jobs/{number}" for number in range(4)]
    assert "adapter=vera" in record["jobs"][3]["overrides"]
    assert "stages.sft.adapter=vera" in record["jobs"][3]["overrides"]
    assert json.loads((tmp_path / "runs/grid/sweep.json").read_text(encoding="utf-8")) == record
    ppo = [config.stages[2] for config in ran]
    assert [(spec.adapter.method, spec.stage.kl_coef) for spec in ppo] == [
        ("lora", 0.02), ("lora", 0.05), ("vera", 0.02), ("vera", 0.05)
    ]  # fmt: skip
    assert [(config.out, config.name) for config in ran][3] == (str(tmp_path / "runs/grid/jobs"), "3")
    assert ran[3].command[3:8] == [*record["jobs"][3]["overrides"], f"out='{tmp_path}/runs/grid/jobs'"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["grid"]


def test_sweep_goes_on_after_a_failed_job(capfd, ran, monkeypatch):
    def fail(config, shared=None):
        if config.seed == 1:
            raise TrainingStopped("loss is NaN")
        return {"status": "done"}

    monkeypatch.setattr(pipeline, "run", fail)
    code, out, _ = run(capfd, "run", "-m", "pipeline=sft", "seed=0,1,2", "--json")
    record = json.loads(out)
    assert code == 3 and record["status"] == "failed"
    assert [job["status"] for job in record["jobs"]] == ["done", "failed", "done"]
    assert record["jobs"][1]["error"]["message"] == "loss is NaN"


def test_sweep_finds_mistakes_before_the_first_job(capfd, ran, tmp_path):
    for words in (
        ["adapter=lora,verra"],
        ["stages.sft.lr=0.1,abc"],
        ["adapter=lora,full", "adapter.rank=2"],
        ["name=a,b"],
    ):
        assert run(capfd, "run", "-m", *words)[0] == 2
    assert not ran and not list(tmp_path.iterdir())


def test_sweep_with_own_recipes(capfd, ran, tmp_path):
    (tmp_path / "mine" / "adapter").mkdir(parents=True)
    (tmp_path / "mine" / "adapter" / "own.yaml").write_text("method: vera\nrank: 5\n", encoding="utf-8")
    words = ["pipeline=sft", "adapter=own,lora", "--config-dir", str(tmp_path / "mine")]
    assert run(capfd, "run", "--multirun", *words)[0] == 0
    assert [config.stages[0].adapter.rank for config in ran] == [5, 16]


def test_same_sweep_same_folder(capfd, ran, tmp_path):
    for _ in range(2):
        assert run(capfd, "run", "-m", "pipeline=sft", "seed=0,1")[0] == 0
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert [config.name for config in ran] == ["0", "1", "0", "1"]


def test_a_run_ends_with_a_verdict_and_what_to_do_next(capfd, ran, monkeypatch, tmp_path):
    def finish(config, shared=None):
        (tmp_path / "runs" / "mine").mkdir(parents=True)
        record = {"status": "done", "name": "mine", "pipeline": "sft", "seed": 0, "stages": []}
        (tmp_path / "runs" / "mine" / "run.json").write_text(dumps(record), encoding="utf-8")
        return record

    monkeypatch.setattr(pipeline, "run", finish)
    code, out, err = run(capfd, "run", "pipeline=sft", "name=mine")
    assert code == 0 and err == ""
    for line in (
        "The run is done.",
        "runs/mine/report.html",
        "align run pipeline=sft adapter=vera",
        "data.path=my.jsonl",
    ):
        assert line in out


def test_a_sweep_may_stand_in_any_folder(capfd, ran, tmp_path):
    place = tmp_path / "it's a, folder=x"
    place.mkdir()
    words = ["pipeline=sft", "seed=0,1", f"out={quoted(place)}"]
    assert run(capfd, "run", "-m", *words)[0] == 0
    assert [config.name for config in ran] == ["0", "1"]
    assert ran[0].out.startswith(str(place))


def quoted(path):
    return "'" + str(path).replace("'", "\\'") + "'"


def test_a_port_is_a_flag_of_the_server_as_of_the_pages(capfd, tmp_path, monkeypatch):
    """The port is taken before a run is looked for, and the remedy that is named is one that the verb knows."""
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = run(capfd, "serve", "RUN", "--port", str(taken.getsockname()[1]))
    assert code == 2 and "--port 0 takes any free one" in err
    assert "not a port" in run(capfd, "serve", "RUN", "--port", "none")[2]
