"""A base in parts, two processes (gloo, CPU): every file and number is that of a base which each process has whole."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from align.adapters.shapes import meta_model
from align.config.compose import compose
from align.config.registries import adapters
from align.config.schema import Load
from align.models.fingerprint import read_model_config
from align.models.sharding import finish_passes, layers_of, whole
from align.planning.preflight import require_plans
from data_prep.core.errors import UserError
from tests.launching import ROOT, launched
from tests.parts_worker import CASES
from tests.tiny_chain import base, pipeline_words, read

CHAIN = ["sft", "reward_model", "ppo", "evaluate"]
UNEVEN = [f"stages.{name}.micro_tokens=60" for name in CHAIN[:3]]
"""Processes cut their shares of a batch into unequal numbers of passes."""
ALWAYS = ("qlora", "dora", "prefix", "feature_extraction")
"""Methods that ask most of a base in parts; `make test-grid` goes through all."""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The folder in which two processes left a chain without and with parts, and what they found of the methods."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    cases = [found["case"] for found in params if found.get("case") in CASES]
    folder = tmp_path_factory.mktemp("parts")
    words = pipeline_words("rlhf", *UNEVEN, "stages.sft.adapter.dropout=0.1", f"out={folder}")
    runs = [[*words, "name=none"], [*words, "name=base", "distributed.shard=base"]]
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
        "distributed.shard=none, or take an adapter: all the others stand on a base in parts"
    )


def test_merging_a_parent_is_refused(out: Path) -> None:
    parent = [f"stages.sft.init={out / 'none' / 'sft'}", "stages.sft.on_parent=merge"]
    with pytest.raises(UserError, match=r"on_parent=merge makes a copy of all weights.*stages\.sft\.on_parent=stack"):
        require_plans(compose(words(*parent)), base())


def test_sharding_more_than_the_base_is_refused() -> None:
    with pytest.raises(UserError, match=r"distributed\.shard.*none.*base"):
        compose(words("distributed.shard=full"))


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
    for in_parts in (True, False):
        with pytest.raises(UserError, match="no card here"):
            shared_base.SharedBase.open(base(), identity, Load.fp32, torch.device("cuda"), in_parts=in_parts)
    assert ["device_map" in options for options in asked] == [False, True]


def test_one_process_waits_for_none() -> None:
    import torch

    finish_passes()
    tensor = torch.ones(2)
    assert whole(tensor) is tensor
