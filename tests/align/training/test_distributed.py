"""Two processes (gloo, CPU) do what one does: the same updates, the same numbers, and no hang on uneven shares."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align.tracking.metrics import read_metrics
from tests.tiny_chain import HOME, base, execute, finished, pipeline_words, read

SCRIPT = """
import json, os, sys
import torch
torch.set_num_threads(1)
from align.config import compose
from align.pipeline import run
for words in json.loads(sys.argv[1]):
    run(compose(words))
    print(f"rank {os.environ['RANK']} done", flush=True)
torch.distributed.destroy_process_group()
"""
SECONDS = 150
PLAIN = ["stages.sft.optimizer=sgd", "stages.sft.lr=2.0", "stages.sft.max_steps=3", "stages.sft.schedule=constant"]
CASES = {
    "sft": ["sft", *PLAIN, "stages.sft.eval_every=1", "stages.sft.max_grad_norm=1e9"],
    "uneven": ["sft", *PLAIN, "stages.sft.batch_size=7", "stages.sft.micro_batch_size=2", "stages.sft.adapter=vera"],
    "one_held_out": ["sft", *PLAIN, "data.conversations.eval_rows=1", "stages.sft.eval_every=1"],
    "patient": ["sft", *PLAIN, "stages.sft.patience=1", "stages.sft.eval_every=1", "stages.sft.lr=1e-30"],
    "reward_model": [
        "reward_model",
        *(word.replace("stages.sft", "stages.reward_model") for word in PLAIN),
        "stages.reward_model.micro_tokens=60",
    ],
}


def words_of(case: list[str], out: Path) -> list[str]:
    pipeline, *more = case
    return [*pipeline_words(pipeline, *more), f"out={out}"]


def ppo_words() -> list[str]:
    chain = finished()
    inputs = [f"stages.ppo.init={chain / 'sft'}", f"stages.ppo.reward={chain / 'reward_model'}"]
    return ["ppo", *inputs, "stages.ppo.critic_warmup=0", "stages.ppo.batch_size=7", "stages.ppo.micro_tokens=40"]


def launched(commands: list[list[str]]) -> str:
    """Run compositions one after the other in two processes; the launcher and its children are ended on a hang."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = HOME / "two.py"
    script.write_text(SCRIPT, encoding="utf-8")
    root = str(Path(__file__).resolve().parents[3])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    process = subprocess.Popen(
        [*launcher, str(script), json.dumps(commands)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate()
        pytest.fail(f"two processes hang; they had said:\n{output[-1500:]}")
    errors = [line for line in output.splitlines() if "Error" in line]
    assert process.returncode == 0, "\n".join(errors[:10]) + output[-1500:]
    return output


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Every case by one process and by two: name -> (folder of one, folder of two)."""
    base()
    out = tmp_path_factory.mktemp("processes")
    cases = {**CASES, "ppo": ppo_words()}
    output = launched([[*words_of(case, out / "two"), f"name={name}"] for name, case in cases.items()])
    assert output.count("rank 0 done") == output.count("rank 1 done") == len(cases)
    for name, case in cases.items():
        from align.config.compose import compose

        execute(compose([*words_of(case, out / "one"), f"name={name}"]))
    return {name: (out / "one" / name, out / "two" / name) for name in cases}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_update_of_one(name, both):
    one, two = (folder / CASES[name][0] for folder in both[name])
    for file in sorted(path.name for path in one.glob("*.safetensors")):
        ours, theirs = load_file(one / file), load_file(two / file)
        assert ours.keys() == theirs.keys() and ours
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key], value, rtol=0, atol=1e-6)
    start = load_file(finished() / "sft" / "adapter_model.safetensors")
    if name == "sft":
        assert max(float((start[key] - ours[key]).abs().max()) for key in ours) > 1e-3, "nothing was trained"


@pytest.mark.parametrize("name", CASES)
def test_two_processes_log_the_numbers_of_one(name, both):
    ours, theirs = (read_metrics(folder / CASES[name][0] / "metrics.jsonl") for folder in both[name])
    assert len(ours) == len(theirs) > 0
    for one, two in zip(ours, theirs, strict=True):
        assert one.keys() == two.keys()
        for key, value in one.items():
            if key == "micro_batches":  # each process packs its own share
                continue
            assert two[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-5)), key


def test_ppo_runs_and_keeps_its_promises(both):
    one, two = (read(folder / "run.json") for folder in both["ppo"])
    assert two["status"] == "done"
    step0 = two["stages"][0]["metrics"]["step0"]
    assert step0["kl"] <= 1e-5 and step0["ratio_dev"] <= 1e-5 and sorted(step0["grad_roles"]) == ["policy", "value"]
    rows = read_metrics(both["ppo"][1] / "ppo" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2]
    first = read_metrics(both["ppo"][0] / "ppo" / "metrics.jsonl")[0]
    assert rows[0].keys() == first.keys() and rows[0]["lr"] == pytest.approx(first["lr"])
    assert one["stages"][0]["trainable"] == two["stages"][0]["trainable"]


def test_a_finished_stage_of_two_processes_is_whole(both):
    from align.checkpoints.checkpoint import Checkpoint

    for name, (_, two) in both.items():
        stage = CASES.get(name, ["ppo"])[0]
        assert all(check["ok"] for check in Checkpoint.open(two / stage).verify())
        assert not [path.name for path in two.iterdir() if "staging" in path.name]
