"""Two processes (gloo, CPU) do what one does: the same updates, the same numbers, and no hang on uneven shares.

A launcher takes seconds to start them: one start is of a run that signals stop, another of all the rest.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from align.checkpoints.checkpoint import Checkpoint
from align.config.compose import compose
from align.rl.rollouts import Rollouts
from align.tracking.metrics import read_metrics
from align.training import optimizer
from align.training.context import StageContext
from align.training.objectives import LanguageModeling
from align.training.optimizer import shared_module
from data_prep.core.errors import UserError
from tests.align.training.test_resume import contents
from tests.launching import ACCELERATE, SECONDS, TORCHRUN, launched
from tests.tiny_chain import base, data_words, execute, finished, pipeline_words, read, refused, rows_folder, sft
from tests.tiny_training import lora, process

SCRIPT = """
import gc, json, os, sys
import torch
torch.set_num_threads(1)
from align.config.compose import compose
from align.pipeline import run
from align.stages import supervised
from align.training.context import StageContext
from data_prep.core.errors import TrainingStopped
from data_prep.prepare.prepare import Preparation
from tests.align.training.test_distributed import digest_of
supervised.SAMPLED = 8
asked, fails_at = 0, 0
prepare, rows = Preparation.run, StageContext.rows
def told_prepare(self, on_disk):
    print(f"rank {os.environ['RANK']} prepares", flush=True)
    return prepare(self, on_disk)
def told_rows(self, kind):
    found = rows(self, kind)
    print(f"rank {os.environ['RANK']} has rows {digest_of(found)}", flush=True)
    return found
Preparation.run, StageContext.rows = told_prepare, told_rows
def score(prompts, replies, fields):
    global asked
    asked += 1
    if os.environ["RANK"] == "1" and asked == fails_at:
        raise ValueError("no such judge")
    return [len(reply) % 5 for reply in replies]
for words in json.loads(sys.argv[1]):
    run(compose(words))
    gc.freeze()
    print(f"rank {os.environ['RANK']} done", flush=True)
for fails_at, words in json.loads(sys.argv[3] if len(sys.argv) > 3 else "[]"):
    asked = 0
    try:
        run(compose(words))
    except TrainingStopped as stopped:
        print(f"rank {os.environ['RANK']} stopped: {stopped}", flush=True)
if len(sys.argv) > 2:
    from align.cli.dispatch import main
    from align.training.loop import HeldOut
    def fails(self):
        raise TrainingStopped("held-out loss nan is not finite", hint="look at the evaluation rows")
    if os.environ["RANK"] == "1":
        HeldOut.evaluate = fails
    sys.exit(main(["run", *json.loads(sys.argv[2])]))
torch.distributed.destroy_process_group()
"""
STOPPED = """
import json, os, signal, sys, time
import torch
torch.set_num_threads(1)
from align.cli.dispatch import main
from align.training.optimizer import Updater
from data_prep.core.interrupts import Interrupts
come, clip, seen = Interrupts._come, Updater._clip, []
def counted(self, number, frame):
    seen.append(number)
    come(self, number, frame)
def in_a_step(self, parameters):
    if self.step_number == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getppid(), signal.SIGTERM)
        end = time.monotonic() + 600
        while len(seen) < 2 and time.monotonic() < end:  # the launcher passes on what it got
            time.sleep(0.01)
    return clip(self, parameters)
Interrupts._come, Updater._clip = counted, in_a_step
code = main(["run", *json.loads(sys.argv[1])])
print(f"rank {os.environ['RANK']} ends with {code}", flush=True)
sys.exit(code)
"""


def digest_of(prepared):
    """A hash of all rows, in their order, and of their card."""
    told = [*map(vars, [*prepared.train, *prepared.eval]), prepared.card]
    return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


CLOSE = 1e-4
"""Of the largest change of a weight: two processes add up the same numbers in another order, three steps long, and
each step starts where the last one's rounding left it. A wrong share of a row is at least a hundred times as much."""
PLAIN = ["stages.sft.optimizer=sgd", "stages.sft.lr=2.0", "stages.sft.max_steps=3", "stages.sft.schedule=constant"]
CASES = {
    "sft": ["sft", *PLAIN, "stages.sft.eval_every=1", "stages.sft.max_grad_norm=1e9"],
    "uneven": ["sft", *PLAIN, "stages.sft.batch_size=7", "stages.sft.micro_batch_size=2", "stages.sft.adapter=vera"],
    "patient": [
        "sft",
        *PLAIN,
        "stages.sft.patience=1",
        "stages.sft.eval_every=1",
        "stages.sft.lr=1e-30",
        "data.conversations.eval_rows=1",  # one process has none
    ],
    "reward_model": [
        "reward_model",
        *(word.replace("stages.sft", "stages.reward_model") for word in PLAIN),
        "stages.reward_model.micro_tokens=60",
    ],
    "kto": [
        "kto",
        *(word.replace("stages.sft", "stages.kto") for word in PLAIN),
        "stages.kto.micro_batch_size=3",
        "adapter.layers=top_1",  # each process keeps what the block below gives for its own rows
    ],
}


def words_of(case: list[str], out: Path) -> list[str]:
    pipeline, *more = case
    return [*pipeline_words(pipeline, *more), f"out={out}"]


def ppo_words() -> list[str]:
    chain = finished()
    inputs = [f"stages.ppo.init={chain / 'sft'}", f"stages.ppo.reward={chain / 'reward_model'}"]
    return [
        "ppo",
        *inputs,
        "stages.ppo.critic_warmup=0",
        "stages.ppo.batch_size=7",
        "stages.ppo.minibatches=4",
        "stages.ppo.micro_tokens=40",
        "stages.ppo.ptx_coef=0.1",
        "stages.ppo.ema_decay=0.5",
    ]


def judged_words(out: Path, name: str) -> list[str]:
    """A function judges replies: at a look, then in an update, and so on; each process asks it for its share."""
    short = ["advantage=reinforce_pp", "updates=2", "max_approx_kl=9", "eval_every=1", "monitor=reward"]
    start = [f"stages.ppo.init={finished() / 'sft'}", "stages.ppo.reward={python: __main__.score}", "allow_code=true"]
    return [*pipeline_words("ppo", *start, *(f"stages.ppo.{word}" for word in short)), f"out={out}", f"name={name}"]


def evaluate_words() -> list[str]:
    chain = finished()
    inputs = [f"stages.evaluate.init={chain / 'ppo'}", f"stages.evaluate.reward={chain / 'reward_model'}"]
    pairs = f"stages.evaluate.pairs={rows_folder() / 'preferences.jsonl'}"
    return ["evaluate", *inputs, "stages.evaluate.batch_size=2", "stages.evaluate.prompts=7", pairs]


def refresh_words() -> list[str]:
    """A round on the policy's own replies: 24 prompts, an uneven share of each process in every pass."""
    chain = finished()
    inputs = [f"stages.refresh.init={chain / 'ppo'}", f"stages.refresh.reward={chain / 'reward_model'}"]
    plain = [word.replace("stages.sft", "stages.refresh") for word in PLAIN]
    asked = ["judge={rule: length, target: 3}", "prompts=24", "batch_size=7"]
    return ["refresh", *inputs, *plain, *(f"stages.refresh.{word}" for word in asked)]


def pretrain_words(out: Path) -> list[str]:
    """On a fresh base, which one of them writes; as much of it is kept as of any."""
    short = ["stages.pretrain.max_steps=4", "stages.pretrain.batch_size=4", "stages.pretrain.eval_every=2"]
    return ["pipeline=pretrain", "model=nano_blank", "adapter=full", *data_words(), *short, f"out={out}"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """(folder of a run that SIGTERM stopped: each process and the launcher got it, what was said)."""
    out = tmp_path_factory.mktemp("stopped")
    (out / "stopped.py").write_text(STOPPED, encoding="utf-8")
    said = launched(str(out / "stopped.py"), json.dumps([*pretrain_words(out), "name=n"]), by=ACCELERATE, code=1)
    kept = sorted(path.name for path in (out / "n" / ".staging-pretrain" / "resume").iterdir())
    return out / "n", said, kept


@pytest.fixture(scope="module")
def started(tmp_path_factory, stopped):
    """What two processes said of every case, then of the run that was stopped and its like, then of one that fails."""
    base()
    out = tmp_path_factory.mktemp("processes")
    cases = {**CASES, "ppo": ppo_words(), "evaluate": evaluate_words(), "refresh": refresh_words()}
    (out / "two.py").write_text(SCRIPT, encoding="utf-8")
    commands = [[*words_of(case, out / "two"), f"name={name}"] for name, case in cases.items()]
    commands += [[*pretrain_words(stopped[0].parent), "name=n"], [*pretrain_words(out / "two"), "name=n"]]
    fails = [*words_of(CASES["sft"], out / "two"), "name=fails"]
    flaky = [(number, judged_words(out / "two", "flaky")) for number in (3, 2, 0)]  # a look, an update after it, none
    judged = [*flaky, (0, judged_words(out / "two", "calm"))]
    output = launched(str(out / "two.py"), json.dumps(commands), json.dumps(fails), json.dumps(judged), code=1)
    assert output.count("rank 0 done") == output.count("rank 1 done") == len(commands)
    return out, cases, output


ROWS = StageContext.rows
DIGESTS = []
"""Of the rows of every stage that ran in this process alone."""


def told(context, kind):
    found = ROWS(context, kind)
    DIGESTS.append(digest_of(found))
    return found


@pytest.fixture(scope="module")
def both(started):
    """Every case by one process and by two: name -> (folder of one, folder of two, folder of what they start from)."""
    out, cases, _ = started
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the two, so that the order of sums is theirs
    for name, case in cases.items():
        with patch.object(StageContext, "rows", told):
            execute(compose([*words_of(case, out / "one"), f"name={name}"]))
        if name in CASES and name != "patient":  # which begins as "sft" does
            still = [f"stages.{case[0]}.lr=1e-44", f"stages.{case[0]}.max_steps=1"]  # leaves every weight as it begins
            execute(compose([*words_of([*case, *still], out / "start"), f"name={name}"]))
    torch.set_num_threads(threads)
    begins = {name: "sft" if name == "patient" else name for name in cases}
    return {name: (out / "one" / name, out / "two" / name, out / "start" / begins[name]) for name in cases}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_update_of_one(name, both):
    one, two, start = (folder / CASES[name][0] for folder in both[name])
    for file in sorted(path.name for path in one.glob("*.safetensors")):
        ours, theirs, before = load_file(one / file), load_file(two / file), load_file(start / file)
        assert ours.keys() == theirs.keys() == before.keys() and ours
        moved = max(float((value - before[key]).abs().max()) for key, value in ours.items())
        assert moved > (0 if name == "patient" else 1e-3), "nothing was trained"
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key], value, rtol=0, atol=CLOSE * moved)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_log_the_numbers_of_one(name, both):
    ours, theirs = (read_metrics(folder / CASES[name][0] / "metrics.jsonl") for folder in both[name][:2])
    assert len(ours) == len(theirs) > 0
    for one, two in zip(ours, theirs, strict=True):
        assert one.keys() == two.keys()
        for key, value in one.items():
            if key == "micro_batches":  # each process packs its own share
                continue
            assert two[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-5)), key


def test_rows_are_prepared_by_one_process_and_read_by_both(both, started):
    """All that the second one has are those of the first, which are those of a single process."""
    _, _, said = started
    first, second = (re.findall(rf"rank {rank} has rows ([0-9a-f]{{64}})", said) for rank in "01")
    assert first == second and said.count("rank 0 prepares") == len(first) and "rank 1 prepares" not in said
    assert len(set(DIGESTS)) > 3 and set(DIGESTS) <= set(first)


def test_ppo_runs_and_keeps_its_promises(both):
    one, two = (read(folder / "run.json") for folder in both["ppo"][:2])
    assert two["status"] == "done"
    step0 = two["stages"][0]["metrics"]["step0"]
    assert step0["kl"] <= 1e-5 and step0["ratio_dev"] <= 1e-5 and sorted(step0["grad_roles"]) == ["policy", "value"]
    alone, rows = (read_metrics(folder / "ppo" / "metrics.jsonl") for folder in both["ppo"][:2])
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2]
    assert [row.keys() for row in rows] == [row.keys() for row in alone], "looks and updates alike"
    for key, allowed in (("objective/reward", 1e-4), ("response/len_mean", 0.0)):
        assert rows[0][key] == pytest.approx(alone[0][key], rel=allowed), "the first look is at the same policy"
    assert rows[1]["lr"] == pytest.approx(alone[1]["lr"])
    assert one["stages"][0]["trainable"] == two["stages"][0]["trainable"]


def test_an_evaluation_by_two_processes_has_the_bytes_of_one(both):
    one, two = (folder / "evaluate" for folder in both["evaluate"][:2])
    for name in ("result.json", "samples.jsonl", "data_card.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_a_round_by_two_processes_has_the_pairs_and_the_update_of_one(both):
    one, two = (folder / "refresh" for folder in both["refresh"][:2])
    assert (one / "sampled.jsonl").read_bytes() == (two / "sampled.jsonl").read_bytes()
    assert len((one / "sampled.jsonl").read_text(encoding="utf-8").splitlines()) > 8
    before = load_file(finished() / "reward_model" / "adapter_model.safetensors")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    moved = max(float((value - before[key]).abs().max()) for key, value in ours.items())
    assert moved > 1e-3 and all((theirs[key] - value).abs().max() <= CLOSE * moved for key, value in ours.items())


def test_a_reward_model_is_measured_by_two_processes_over_all_rows(both):
    """Their weights differ by rounding, and so do their scores; what is counted is the same."""
    one, two = (read(folder / "run.json")["stages"][0]["metrics"] for folder in both["reward_model"][:2])
    assert one["n"] == two["n"] > 2 and one["accuracy"] == two["accuracy"]
    assert one["probe_scores"] == pytest.approx(two["probe_scores"], abs=1e-4)


def test_a_finished_stage_of_two_processes_is_whole(both):
    for name, (_, two, _) in both.items():
        stage = CASES.get(name, [name])[0]
        if stage == "evaluate":
            continue
        assert all(check["ok"] for check in Checkpoint.open(two / stage).verify())
        assert not [path.name for path in two.iterdir() if "staging" in path.name]


def test_sigterm_to_both_and_to_their_launcher_loses_nothing(stopped, started):
    """It comes in the second step; the launcher, accelerate's here, passes it on, so that each gets it twice."""
    run, said, kept = stopped
    assert said.count(f"run {run}: pretrain") == 1 and kept == ["step-3"]
    told = "align: interrupted; the state after step 3 is kept: the same command goes on there"
    assert said.count(told) == said.count("align: ends after this step and keeps its state") == 2
    assert "leaves at once" not in said
    assert [said.count(f"rank {rank} ends with 130") for rank in (0, 1)] == [1, 1]
    out, _, later = started
    assert later.count("pretrain: goes on after step 3, where it was stopped") == 1
    assert read(run / "run.json")["status"] == "done"
    assert contents(run / "pretrain") == contents(out / "two" / "n" / "pretrain")


def test_an_error_of_one_process_ends_both_with_its_line(started):
    out, _, said = started
    assert said.count("align: held-out loss nan is not finite; look at the evaluation rows") == 1
    assert "[rank" not in said, "no traceback of a process"
    record = read(out / "two" / "fails" / "run.json")
    assert (record["status"], record["failed_stage"]) == ("stopped", "sft")
    assert record["error"].startswith("another process of the run has ended; its own message says why")


def test_a_scorer_that_fails_one_process_stops_all_and_costs_no_update(started):
    """It fails the second process at the look behind the first update, and again in the second update."""
    out, _, said = started
    line = "stopped: the function __main__.score failed with ValueError: no such judge; mend it; the same command goes"
    assert [said.count(f"rank {rank} {line}") for rank in (0, 1)] == [2, 2]
    assert said.count("ppo: goes on after step 1, where it was stopped") == 2
    flaky, calm = out / "two" / "flaky" / "ppo", out / "two" / "calm" / "ppo"
    assert contents(flaky) == contents(calm)


def test_fewer_prompts_than_processes_are_refused():
    options = compose([*pipeline_words("ppo"), "stages.ppo.batch_size=2"]).stages[0].stage
    context = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=3),
        renderer=SimpleNamespace(end_token_id=0),
        spec=SimpleNamespace(name="ppo"),
    )
    with pytest.raises(UserError) as caught:
        Rollouts(context, [], SimpleNamespace(policy=lora()), options)
    said = (
        "stages.ppo.batch_size: 2 prompts of an update cannot be spread over 3 processes; set stages.ppo.batch_size=3"
    )
    assert str(caught.value).startswith(said)


def test_frozen_tensors_and_buffers_are_not_broadcast(monkeypatch):
    monkeypatch.setattr(optimizer, "DistributedDataParallel", Unwrapped)
    objective = LanguageModeling(lora())
    several = SimpleNamespace(num_processes=2)
    left_out = set(shared_module(objective, several)._ddp_params_and_buffers_to_ignore)
    trained = {name for name, p in objective.named_parameters() if p.requires_grad}
    every = {name for name, _ in [*objective.named_parameters(), *objective.named_buffers()]}
    assert trained and left_out >= every - trained and not left_out & trained


class Unwrapped(DistributedDataParallel):
    """Takes its module as it is."""

    def __new__(cls, module):
        return module


JOINED = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    "environment",
    [{"WORLD_SIZE": "2", **JOINED}, {"OMPI_COMM_WORLD_SIZE": "2"}],
    ids=["not joined", "another launcher"],
)
def test_processes_that_would_not_work_together_are_refused(environment, tmp_path, monkeypatch):
    process()  # this one works alone
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        execute(compose(sft(tmp_path)))
    assert str(caught.value).startswith("WORLD_SIZE: 2 processes were launched, but 1 would work on the run; launch")
    assert not (tmp_path / "n").exists()


def test_a_number_of_processes_without_a_launcher_is_refused_by_the_command(tmp_path):
    """In a process of its own, which has not met accelerate yet and might wait for the others."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3]), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "align.cli", "run", *sft(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert refused(done.returncode, done.stderr).startswith("align: WORLD_SIZE: 2 processes were launched")


DIES = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from align.config.compose import compose
from align.pipeline import run
from align.stages import supervised
from align.training import resume
supervised.SAMPLED = 8
resume._SHARE = 0
offer = resume.StateSaver.offer
def dies(self, updater, step, more):
    if step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    offer(self, updater, step, more)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
    resume.StateSaver.offer = dies
run(compose(json.loads(sys.argv[1])))
torch.distributed.destroy_process_group()
"""


@pytest.mark.grid
def test_a_process_that_is_killed_is_started_again_and_changes_no_bit(tmp_path):
    """`kill -9` of one of them, with a base in parts; the other run has it whole and no failure."""
    words = [*sft(tmp_path), "stages.sft.max_steps=6", "stages.sft.save_minutes=1e-9", "stages.sft.adapter.dropout=0.1"]
    (tmp_path / "dies.py").write_text(DIES, encoding="utf-8")
    (tmp_path / "two.py").write_text(SCRIPT, encoding="utf-8")
    again = (*TORCHRUN, "--max-restarts", "1")
    killed = [*words, "name=killed", "distributed.shard=base"]
    output = launched(str(tmp_path / "dies.py"), json.dumps(killed), by=again)
    assert "goes on after step" in output
    launched(str(tmp_path / "two.py"), json.dumps([[*words, "name=whole"]]))
    for name in ("adapter_model.safetensors", "checkpoint.json", "metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "killed" / "sft" / name).read_bytes() == (tmp_path / "whole" / "sft" / name).read_bytes()


@pytest.mark.grid
def test_four_processes_train_a_chain_with_a_base_in_parts(tmp_path):
    """Each has a quarter of the base, and the chain has the bytes of four that have it whole."""
    base()
    trained = ("sft", "reward_model", "ppo")
    words = [*pipeline_words("rlhf", *(f"stages.{name}.batch_size=8" for name in trained)), f"out={tmp_path}"]
    (tmp_path / "four.py").write_text(SCRIPT, encoding="utf-8")
    runs = [[*words, "name=whole"], [*words, "name=parts", "distributed.shard=base"]]
    said = launched(str(tmp_path / "four.py"), json.dumps(runs), by=("torch.distributed.run", "--nproc_per_node", "4"))
    assert [said.count(f"rank {rank} done") for rank in range(4)] == [2] * 4
    for stage in (*trained, "evaluate"):
        whole, parts = (contents(tmp_path / name / stage) for name in ("whole", "parts"))
        assert whole == parts and whole
