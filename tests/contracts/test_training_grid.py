"""Every method in every stage: it trains, lowers its loss, is saved, and scores the same in a fresh process.

A new method enters by existing: nothing here names one. The default run takes part of the cells, `make test-grid` the
others.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from align.checkpoints.compatibility import ParentMode
from align.config.registries import adapters, stages
from align.config.schema import Load
from align.rl.actor_critic import ActorCritic, PPOLoss
from align.stages.preference import PreferenceStage
from align.stages.supervised import AdapterHook, groups_of
from align.training.dpo import DirectPreference
from align.training.kto import KahnemanTversky
from align.training.objectives import LanguageModeling, Objective, Pairwise
from align.training.optimizer import Updater
from align.training.options import Optimizer
from align.training.orpo import OddsRatio
from reward.head import ScalarHead
from tests.tiny_chain import HOME, base, bases, covered, fresh, made, methods_and_loads, read
from tests.tiny_training import experience_rows, labelled_rows, options, pair_rows, process, token_rows

CASES = methods_and_loads()
RELOAD = """
import json, sys
import torch
torch.manual_seed(987654)
torch.set_num_threads(int(sys.argv[1]))
from pathlib import Path
from align.checkpoints.checkpoint import Checkpoint
from align.config.schema import Load
from align.training.saving import outputs
from tests.tiny_chain import bases
found = bases(Path(sys.argv[2]))
for folder in map(Path, sys.argv[3:]):
    saved = Checkpoint.open(folder)
    role = found.realise(saved, "again", Load(saved.load))
    print(json.dumps(outputs(role, saved.probe_ids)))
"""
STAGES = ("sft", "reward_model", "ppo", "ppo/value")
JUDGED = [name for name, cls in stages.items() if issubclass(cls, PreferenceStage)]
"""Stages that learn from judged replies: by default every second method goes through one of them, in turn."""


def objective_of(stage: str, method: str, load: Load) -> tuple[Objective, list]:
    found = bases()
    role = fresh(method, load, found)
    torch.manual_seed(0)
    if stage == "sft":
        return LanguageModeling(role), token_rows()
    if stage == "reward_model":
        role.head = ScalarHead(role.tree.config.hidden_size)
        return Pairwise(role, centering=0.0), pair_rows()
    if stage in JUDGED:
        reference = found.start_of(None, ParentMode(None, load), "reference")
        made_by = {
            "dpo": lambda: (DirectPreference(role, reference), pair_rows()),
            "kto": lambda: (KahnemanTversky(role, reference), labelled_rows()),
            "orpo": lambda: (OddsRatio(role), pair_rows()),
        }
        return made_by[stage]()
    value = fresh(method, load, found, seed=2)
    value.head = ScalarHead(value.tree.config.hidden_size)
    return ActorCritic(role, value, PPOLoss(value_clip=0.0, value_coef=0.5)), experience_rows()


def stages_covered() -> list:
    """(method, precision, stage): of each method and stage one precision in turn; the rest is for the grid."""
    found = []
    for turn, stage in enumerate(["sft", "reward_model", "ppo"]):
        for case in covered(CASES, turn):
            found.append(pytest.param(*case.values, stage, marks=case.marks, id=f"{case.id}-{stage}"))
    return found + judged_covered()


def judged_covered() -> list:
    """(method, precision, stage) of stages that learn from judged replies; by default every second method, in turn, at
    the precision of its chain, whose policy they start from."""
    found = []
    methods = adapters.names()
    for turn, stage in enumerate(JUDGED):
        for case in covered(CASES):
            own = methods.index(case.values[0]) % (2 * len(JUDGED)) == 2 * turn
            marks = case.marks if own else [pytest.mark.grid]
            found.append(pytest.param(*case.values, stage, marks=marks, id=f"{case.id}-{stage}"))
    return found


@pytest.mark.parametrize(("method", "load", "stage"), stages_covered())
def test_it_lowers_its_loss(method, load, stage):
    """Steps as the loop takes them, on rows that are always the same; all that is declared moves, and nothing else."""
    objective, rows = objective_of(stage, method, load)
    roles = [objective.role] if stage != "ppo" else [objective.policy, objective.value]
    lr = 5e-4 * max(1.0, adapters.get(method).lr_factor)
    chosen = options(optimizer=Optimizer.adamw)
    groups = [group for role in roles for group in groups_of(role, lr, chosen)]
    hooks = [AdapterHook(role) for role in roles]
    updater = Updater(objective, groups, chosen, 12, process(), hooks)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in objective.named_parameters()}
    objective.train()
    losses = [updater.step([objective.collate(rows)])["loss"] for _ in range(12)]
    assert losses[-1] < losses[0] - 1e-4, losses
    for name, parameter in objective.named_parameters():
        trained, was = before[name]
        assert torch.equal(parameter, was) != trained, name


@cache
def chain(method: str, load: Load) -> Path:
    """All stages on a method and precision, a few steps each, every result compared when it was saved."""
    implied = adapters.get(method)().quantization() is not None
    words = [] if implied else [f"model.load={load.value}"]
    rates = ["stages.sft.lr=1e-2", "stages.reward_model.lr=1e-2", "stages.ppo.updates=1", "stages.ppo.critic_warmup=0"]
    names = [f"adapter={method}", f"name={method}-{load.value}"]
    return made("rlhf", *names, *rates, *words, out=HOME / "grid", without="evaluate")


@pytest.mark.parametrize(("method", "load"), covered(CASES))
def test_every_stage_trains_and_saves_it(method, load):
    run = chain(method, load)
    for stage in STAGES:
        record = read(run / stage / "checkpoint.json")
        assert (record["method"], record["load"]) == (method, load.value)
        assert ("head.safetensors" in record["files"]) == (stage in ("reward_model", "ppo/value"))
    step0 = next(s for s in read(run / "run.json")["stages"] if s["name"] == "ppo")["metrics"]["step0"]
    assert step0["kl"] <= 1e-5 and sorted(step0["grad_roles"]) == ["policy", "value"]
    if load is not Load.bf16:
        assert step0["ratio_dev"] <= 1e-5 and step0["reward_parity"] <= 1e-4


@pytest.mark.parametrize(("method", "load", "stage"), judged_covered())
def test_judged_replies_train_it_from_where_it_stands(method, load, stage):
    """Policy and reference are one function to the last bit before the first step, and the base is held once."""
    implied = adapters.get(method)().quantization() is not None
    words = [f"adapter={method}", *([] if implied else [f"model.load={load.value}"]), f"name={method}-{load.value}"]
    below = chain(method, load) / "sft"
    run = made(stage, *words, f"stages.{stage}.init={below}", f"stages.{stage}.lr=1e-2", out=HOME / "judged" / stage)
    record = read(run / stage / "checkpoint.json")
    assert (record["method"], record["load"], record["role"]) == (method, load.value, "policy")
    metrics = read(run / "run.json")["stages"][0]["metrics"]
    assert metrics["step0"].get("max_log_ratio", 0.0) == 0.0 and metrics["memory"]["bases"] == 1
    if "max_log_ratio" in metrics:
        assert metrics["max_log_ratio"] > 0, "nothing was trained"


def test_a_fresh_process_with_another_seed_computes_bit_equal():
    """One process for every checkpoint that the tests before this one made."""
    folders = [run / stage for run in sorted((HOME / "grid").glob("*")) for stage in STAGES]
    folders += [record.parent for record in sorted((HOME / "judged").glob("*/*/*/checkpoint.json"))]
    if not folders:
        pytest.skip("runs after the tests that make the checkpoints")
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, str(torch.get_num_threads()), str(base()), *map(str, folders)],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == len(folders) >= 4
    for folder, line in zip(folders, lines, strict=True):
        assert json.loads(line) == read(folder / "checkpoint.json")["probe"]["expected"], folder


def test_heads_are_trained_and_kept():
    from safetensors.torch import load_file

    for run in sorted((HOME / "grid").glob("*")):
        for stage in ("reward_model", "ppo/value"):
            weight = load_file(run / stage / "head.safetensors")["score.weight"]
            assert float(weight.abs().sum()) > 0
            assert read(run / stage / "checkpoint.json")["head"] == {"kind": "scalar", "shape": list(weight.shape)}
