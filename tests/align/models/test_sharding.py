"""A base in parts, two processes (gloo, CPU): every file and number is that of a base which each process has whole."""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from align.adapters.shapes import meta_model
from align.checkpoints.checkpoint import Checkpoint
from align.config.compose import compose
from align.config.registries import adapters
from align.config.schema import Load, Shard
from align.models.fingerprint import read_model_config
from align.models.sharding import finish_passes, layers_of, whole
from align.planning.preflight import require_plans
from data_prep.core.errors import UserError
from tests.align.training.test_resume import contents, stop_after
from tests.launching import ROOT, launched
from tests.parts_worker import CASES, in_float64
from tests.tiny_chain import HOME, base, execute, parts_of, pipeline_words, read
from tests.tiny_training import process

CHAIN = ["sft", "reward_model", "ppo", "evaluate"]
UNEVEN = [f"stages.{name}.micro_tokens=60" for name in CHAIN[:3]]
"""Processes cut their shares of a batch into unequal numbers of passes."""
MIXED = ("stages.ppo.ptx_coef=0.1", "stages.ppo.ema_decay=0.5")
"""The policy computes two packed rows in a pass, and is averaged."""
ALWAYS = ("qlora", "dora", "prefix", "feature_extraction")
"""Methods that ask most of a base in parts; `make test-grid` goes through all."""
FULL = (("rlhf", "full", "name=full"), ("sft", "full", "name=again"), ("sft", "feature_extraction", "name=features"))
"""Runs with trained weights in parts; the second is stopped behind its first step, and goes on."""
SHORT = ("micro_tokens=60", "save_minutes=1e-9", "eps=0.01")
"""Unequal passes, and steps of Adam that are no jumps where a gradient is nothing but rounding."""


def full_words(pipeline: str, method: str, out: Path, *more: str) -> list[str]:
    """A run that trains weights of the base, or of what else `more` says."""
    trained = [name for name in parts_of(pipeline) if name != "evaluate"]
    short = [f"stages.{name}.{word}" for name in trained for word in SHORT]
    return [*pipeline_words(pipeline, f"adapter={method}", *short, *more), f"out={out}"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The folder in which two processes left a chain without and with parts, and what they found of the methods."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    cases = [found["case"] for found in params if found.get("case") in CASES]
    folder = tmp_path_factory.mktemp("parts")
    words = pipeline_words("rlhf", *UNEVEN, "stages.sft.adapter.dropout=0.1", *MIXED, f"out={folder}")
    runs = [[*words, "name=none"], [*words, "name=base", "distributed.shard=base"]]
    runs += [full_words(pipeline, method, folder, "distributed.shard=full", name) for pipeline, method, name in FULL]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 1)
        execute(compose(full_words("sft", "full", folder, "name=grown")))
    runs.append(full_words("sft", "full", folder, "distributed.shard=full", "name=grown"))
    launched("-m", "tests.parts_worker", json.dumps(runs), json.dumps(cases), str(folder))
    return folder


def found(out: Path, name: str) -> list[list[dict]]:
    """What both processes found of a case: without parts, and with them."""
    return [read(out / f"process-{number}.json")[name] for number in range(2)]


def test_a_chain_writes_the_same_bytes(out: Path) -> None:
    compared = []
    for path in sorted((out / "none").rglob("*")):
        name = path.relative_to(out / "none").as_posix()
        if path.is_file() and name.partition("/")[0] in CHAIN and path.name != "README.md":  # the card has the command
            assert path.read_bytes() == (out / "base" / name).read_bytes(), name
            compared.append(path.name)
    assert {"adapter_model.safetensors", "head.safetensors", "checkpoint.json", "metrics.jsonl"} <= set(compared)
    assert {"result.json", "samples.jsonl", "data_card.json"} <= set(compared)


def test_passes_were_unequal(out: Path) -> None:
    """Else the chain says nothing of passes that are made up."""
    rows = [json.loads(line) for line in (out / "base" / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert any(row["micro_batches"] % 2 for row in rows if row["split"] == "train")


def test_a_process_holds_its_part_of_every_layer_once_for_all_roles(out: Path) -> None:
    layers = layers_of(meta_model(read_model_config(base())))
    matrices = [p for layer in layers for p in layer.parameters() if p.dim() > 1]
    for without, parts in found(out, "shared"):
        assert without["bytes"] == 4 * sum(p.numel() for p in matrices)
        assert parts["bytes"] * 2 == without["bytes"]
        assert parts["storages"] == without["storages"] == len(matrices) and parts["bases"] == 1


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in ALWAYS else [pytest.mark.grid]) for case in CASES]
)
def test_a_method_learns_the_same_bits(case: str, out: Path) -> None:
    for without, parts in found(out, case):
        assert without["weights"] and without == parts


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program behind docs/scale.md."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("scale")


def test_the_page_on_scale_has_the_tables_of_its_program(scale: ModuleType) -> None:
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    for name, part in scale.parts().items():
        assert f"<!-- measured: {name} -->\n{part}<!-- end -->" in page, "python benchmarks/scale.py --document"


def test_what_is_held_and_sent_is_what_the_page_on_scale_says(out: Path, scale: ModuleType) -> None:
    sizes = scale.Base.of(read_model_config(base()))
    for sent in found(out, "sent"):
        assert sent["forward"] == sizes.received("fp32", 2) and sent["training"] == 2 * sizes.received("fp32", 2)
        assert sent["held"] == sizes.held("fp32", 2)


def gap(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of two tensors of a name."""
    return max(float((value - theirs[name]).abs().max()) for name, value in ours.items())


def test_full_tuning_in_parts_is_that_of_one_process(out: Path) -> None:
    """To the rounding of float64: weights, losses, norms; each process holds half of the weights and of their moments.

    Embedding and head are one tensor whose rows cannot be halved: a part is padded by a row.
    """
    weights, alone = in_float64(process(), Shard.none)
    theirs = load_file(out / "float64.safetensors")
    row = 8 * read_model_config(base())["hidden_size"]
    start = load_file(HOME / "odd" / "model.safetensors")
    assert gap(start, theirs) > 1e-3 > 1e-12 >= gap(weights, theirs)
    for both in found(out, "float64"):
        for ours, two in zip(alone["told"], both["told"], strict=True):
            assert two == pytest.approx(ours, rel=1e-12)
        assert 2 * both["weights"] == alone["weights"] + row
    assert sum(both["moments"] for both in found(out, "float64")) == alone["moments"]
    assert all(abs(2 * both["moments"] - alone["moments"]) <= 2 * row for both in found(out, "float64"))


@pytest.fixture(scope="module")
def one(out: Path) -> Path:
    """The folder with the runs of a single process: SFT and reward model by full tuning, SFT of the last block."""
    for pipeline, method, name in (FULL[0], FULL[2]):
        config = compose(full_words(pipeline, method, out / "one", name))
        execute(replace(config, stages=config.stages[:2]))
    return out / "one"


@pytest.mark.parametrize("stage", ["full/sft", "full/reward_model", "features/sft"])
def test_a_checkpoint_of_parts_is_one_folder_as_any_other(stage: str, out: Path, one: Path) -> None:
    """Same files, names and shapes, nearly the same numbers; it stands behind its record and its probe."""
    alike(one / stage, out / stage)
    assert all(check["ok"] for check in Checkpoint.open(out / stage).verify())


def alike(ours: Path, theirs: Path) -> None:
    """Two stages hold the same files, and tensors that differ by rounding."""
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    files = list(ours.glob("*.safetensors"))
    assert files
    for file in files:
        alone, both = load_file(file), load_file(theirs / file.name)
        assert alone.keys() == both.keys()
        assert all(value.dtype == both[key].dtype and value.shape == both[key].shape for key, value in alone.items())
        assert gap(alone, both) <= 1e-6, file


def test_what_is_stopped_in_parts_ends_in_the_same_bits(out: Path) -> None:
    states = out / "stopped" / ".staging-sft" / "resume" / "step-1"
    assert sorted(path.name for path in states.glob("*.safetensors")) == ["state-1.safetensors", "state.safetensors"]
    assert contents(out / "again" / "sft") == contents(out / "full" / "sft")


def test_a_state_in_parts_goes_on_in_one_process(out: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As after the loss of a machine: the parts are put together."""
    shutil.copytree(out / "stopped", tmp_path / "stopped")
    capfd.readouterr()
    execute(compose(full_words("sft", "full", tmp_path, "name=stopped")))
    told = capfd.readouterr().err
    assert "sft: goes on after step 1" in told and "computed with processes=1 (2 before)" in told
    both, alone = (load_file(run / "sft" / "model.safetensors") for run in (out / "full", tmp_path / "stopped"))
    assert gap(alone, both) <= 1e-6


def test_a_state_of_one_process_goes_on_in_parts(out: Path) -> None:
    (said,) = (row for row in read(out / "grown" / "run.json")["warnings"] if row["code"] == "other_passes")
    assert said["message"] == "from step 1 on computed with processes=2 (1 before)"
    parts, grown = (load_file(out / run / "sft" / "model.safetensors") for run in ("full", "grown"))
    assert gap(grown, parts) <= 1e-6


def test_ppo_trains_policy_and_critic_in_parts_beside_a_frozen_reference(out: Path) -> None:
    entry = next(stage for stage in read(out / "full" / "run.json")["stages"] if stage["name"] == "ppo")
    step0 = entry["metrics"]["step0"]
    assert step0["kl"] <= 1e-5 and step0["ratio_dev"] <= 1e-5 and sorted(step0["grad_roles"]) == ["policy", "value"]
    assert entry["metrics"]["reference_unchanged"]
    for folder in ("ppo", "ppo/value"):
        assert all(check["ok"] for check in Checkpoint.open(out / "full" / folder).verify())


WIDE = {
    "full": ("rlhf", "full", *MIXED),
    "mixed": ("rlhf", "full", "stages.reward_model.adapter=lora"),  # a policy in parts beside a critic's LoRA
    "features": ("sft", "feature_extraction", "model.load=nf4", "adapter.norms=true", "adapter.head=true"),
    "dpo": ("sft_dpo", "full", "stages.sft.embedding_drift=0.1", "stages.sft.hidden_drift=0.1"),
    "kto": ("sft_kto", "full", "stages.kto.patience=1", "stages.kto.eval_every=1"),
    "orpo": ("orpo", "full", "stages.orpo.gradient_checkpointing=true"),
}


@pytest.mark.grid
def test_every_stage_in_parts_is_that_without(tmp_path: Path) -> None:
    """On two processes, as replies are drawn by each."""
    runs = [
        full_words(*case[:2], tmp_path / shard, *case[2:], f"name={name}", f"distributed.shard={shard}")
        for name, case in WIDE.items()
        for shard in ("none", "full")
    ]
    launched("-m", "tests.parts_worker", json.dumps(runs), "[]", str(tmp_path))
    for name, case in WIDE.items():
        for stage in parts_of(case[0]):
            if stage != "evaluate":
                alike(tmp_path / "none" / name / stage, tmp_path / "full" / name / stage)


def words(*more: str) -> list[str]:
    return [*pipeline_words("sft"), "distributed.shard=base", *more]


def test_one_process_has_all_of_it() -> None:
    assert require_plans(compose(words()), base())


@pytest.mark.parametrize("name", [name for name, kind in adapters.items() if kind.traits.owns_weights])
def test_methods_that_train_all_weights_are_refused(name: str) -> None:
    with pytest.raises(UserError) as caught:
        require_plans(compose(words(f"adapter={name}")), base())
    assert str(caught.value) == (
        f"distributed.shard: {name} trains a copy of all weights, which each process of sft would hold; set "
        "distributed.shard=full, which cuts that copy too, or take an adapter"
    )
    assert require_plans(compose([*pipeline_words("sft"), f"adapter={name}", "distributed.shard=full"]), base())


def test_moments_that_are_rounded_in_blocks_are_refused_where_weights_are_cut() -> None:
    more = ["distributed.shard=full", "stages.sft.optimizer=adamw_8bit"]
    with pytest.raises(
        UserError, match=r"stages\.sft\.optimizer: adamw_8bit rounds moments in blocks.* set it to adamw"
    ):
        require_plans(compose([*pipeline_words("sft"), *more]), base())


def test_merging_a_parent_is_refused(out: Path) -> None:
    parent = [f"stages.sft.init={out / 'none' / 'sft'}", "stages.sft.on_parent=merge"]
    with pytest.raises(UserError, match=r"on_parent=merge makes a copy of all weights.*stages\.sft\.on_parent=stack"):
        require_plans(compose(words(*parent)), base())


def test_how_a_base_is_held_changes_no_name() -> None:
    assert compose(words()).name == compose(pipeline_words("sft")).name


def test_on_a_card_no_process_ever_has_all_of_a_base_that_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read into the machine's memory, and each process's part goes to its card from there."""
    import torch

    from align.models import shared_base

    asked: list[dict[str, Any]] = []

    def loaded(folder: Path, **options: Any) -> None:
        asked.append(options)
        raise UserError("no card here")

    monkeypatch.setattr(shared_base, "load_weights", loaded)
    identity = shared_base.BaseIdentity("b", None, "f")
    for shard in (Shard.base, Shard.full, Shard.none):
        with pytest.raises(UserError, match="no card here"):
            shared_base.SharedBase.open(base(), identity, Load.fp32, torch.device("cuda"), shard=shard)
    assert ["device_map" in options for options in asked] == [False, False, True]


def test_one_process_waits_for_none() -> None:
    import torch

    finish_passes()
    tensor = torch.ones(2)
    assert whole(tensor) is tensor
