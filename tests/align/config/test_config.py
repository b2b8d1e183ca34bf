"""Composition: every form of override, and every mistake as one line with the nearest name."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from align.adapters.base import Adapter, adapter
from align.config.compose import compose
from align.config.registries import adapters, stages
from align.config.schema import Load, OnPrecisionChange
from align.planning.preflight import check_sources
from align.stages.base import TrainingStage, stage
from data_prep.core.errors import UserError
from data_prep.core.options import option


def by_stage(*overrides, config_dir=None):
    """Stage name -> (adapter's method, its rank)."""
    config = compose(list(overrides), config_dir)
    return {spec.name: (spec.adapter.method, getattr(spec.adapter, "rank", None)) for spec in config.stages}


def problem(*overrides, config_dir=None):
    """The one line that these overrides are answered with."""
    with pytest.raises(UserError) as caught:
        compose(list(overrides), config_dir)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


LORA = ("lora", 16)
VERA = ("vera", 256)


def test_the_default_is_the_whole_chain_on_the_embedded_model():
    config = compose([])
    assert [spec.name for spec in config.stages] == ["sft", "reward_model", "ppo", "evaluate"]
    assert config.pipeline == "rlhf"
    assert config.model.path == "package:nano"
    assert config.model.load is None
    assert config.on_precision_change is OnPrecisionChange.refuse
    assert {spec.data.name for spec in config.stages} == {"smalltalk"}
    assert config.name == f"rlhf-{config.digest[:8]}"
    assert config.command == ["align", "run"]
    stage_options = {spec.name: spec.stage for spec in config.stages}
    assert (stage_options["ppo"].init, stage_options["ppo"].reward) == ("sft", "reward_model")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], [LORA] * 4),
        (["adapter=vera"], [VERA] * 4),
        (["adapter=lora_r64"], [("lora", 64)] * 4),
        (["adapter.rank=8"], [("lora", 8)] * 4),
        (["stages.reward_model.adapter=vera"], [LORA, VERA, LORA, LORA]),
        (["stages.reward_model.adapter.rank=4"], [LORA, ("lora", 4), LORA, LORA]),
        (
            ["adapter.rank=8", "stages.reward_model.adapter.rank=4"],
            [("lora", 8), ("lora", 4), ("lora", 8), ("lora", 8)],
        ),
        (
            ["stages.reward_model.adapter.rank=4", "adapter.rank=8"],
            [("lora", 8), ("lora", 4), ("lora", 8), ("lora", 8)],
        ),
        (["adapter=vera", "stages.sft.adapter=lora"], [LORA, VERA, VERA, VERA]),
        (["adapter=vera", "stages.sft.adapter=lora", "adapter.rank=7"], [LORA, ("vera", 7), ("vera", 7), ("vera", 7)]),
        (["stages.sft.adapter=lora_r64", "stages.sft.adapter.rank=3"], [("lora", 3), LORA, LORA, LORA]),
        (["stages.sft.adapter.rank=3", "stages.sft.adapter=vera"], [("vera", 3), LORA, LORA, LORA]),
        (["stages.sft.adapter={method: vera, rank: 5}"], [("vera", 5), LORA, LORA, LORA]),
        (["+adapter@stages.ppo.adapter=vera"], [LORA, LORA, VERA, LORA]),
        (["stages.sft.adapter=full"], [("full", None), LORA, LORA, LORA]),
        (["stages.sft.adapter=null"], [LORA] * 4),
    ],
    ids=str,
)
def test_adapters_per_stage(overrides, expected):
    assert list(by_stage(*overrides).values()) == expected


def test_values_reach_the_dataclasses():
    config = compose(
        ["stages.ppo.lr=1e-5", "stages.ppo.on_parent=stack", "stages.ppo.init=OTHER/sft", "seed=3", "out=elsewhere",
         "name=mine", "model=hf", "model.path=base", "model.load=nf4", "on_precision_change=recalibrate",
         "adapter.target_modules=[q_proj,v_proj]"]
    )  # fmt: skip
    ppo = next(spec for spec in config.stages if spec.name == "ppo")
    assert (ppo.stage.lr, ppo.stage.on_parent.name, ppo.stage.init) == (1e-5, "stack", "OTHER/sft")
    assert ppo.adapter.target_modules == ["q_proj", "v_proj"]
    assert (config.seed, config.out, config.name) == (3, "elsewhere", "mine")
    assert (config.model.path, config.model.load) == ("base", Load.nf4)
    assert config.on_precision_change is OnPrecisionChange.recalibrate


@pytest.mark.parametrize("text", ["0012", "12e4", "true", "7"])
def test_text_stays_as_typed(text):
    config = compose(["pipeline=sft", f"name={text}", "model=hf", "model.path=base", f"model.revision={text}"])
    assert (config.name, config.model.revision) == (text, text)


def test_data_per_stage():
    config = compose(["stages.sft.data=files", "stages.sft.data.path=my.jsonl", "stages.sft.data.system=Hi"])
    data = {spec.name: spec.data for spec in config.stages}
    assert (data["sft"].name, data["sft"].path, data["sft"].system) == ("files", "my.jsonl", "Hi")
    assert data["sft"].conversations.generator is None
    assert data["ppo"].name == "smalltalk" and data["ppo"].system is None
    assert data["ppo"].conversations.options["styles"] == {"plain": 0.5, "cheerful": 0.25, "pirate": 0.25}


def test_one_file_serves_the_run():
    config = compose(["pipeline=sft", "data=files", "data.path=my.jsonl"])
    assert config.stages[0].data.path == "my.jsonl"


def test_digest_follows_the_content_alone():
    plain = compose([])
    assert compose(["out=elsewhere", "name=x"]).digest == plain.digest
    assert compose(["seed=1"]).digest != plain.digest
    assert compose(["stages.sft.adapter.rank=16"]).digest == plain.digest
    assert json.loads(json.dumps(plain.resolved)) == plain.resolved


def test_stages_are_removed_and_added():
    assert list(by_stage("~stages.evaluate")) == ["sft", "reward_model", "ppo"]
    assert list(by_stage("pipeline=sft", "+stage@stages.again=sft")) == ["sft", "again"]


@pytest.mark.parametrize("group", ["pipeline", "experiment", "model", "adapter", "data"])
def test_every_recipe_composes(group):
    from align.config.hydra_loader import group_choices, recipes

    with recipes(None):
        names = group_choices(group)
    for name in names:
        paths = ["model.path=base"] if group != "model" or name == "hf" else []
        assert compose([f"{group}={name}", *paths, "data.root=folder"]).stages


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["=3"], "'=3' is not an override; overrides are KEY=VALUE"),
        (["adapter=lorra"], "unknown adapter 'lorra' (did you mean 'lora'?"),
        (["stages.sft.adapter=lorra"], "stages.sft.adapter: unknown adapter 'lorra' (did you mean 'lora'?"),
        (["data=smaltalk"], "unknown data 'smaltalk' (did you mean 'smalltalk'?"),
        (["stages.sft.data=alpace"], "stages.sft.data: unknown data 'alpace' (did you mean 'alpaca'?"),
        (["data=my.jsonl"], "for a file: data=files data.path=my.jsonl"),
        (["model=org/base"], "for a folder or hub id: model=hf model.path=org/base"),
        (["pipeline=rhlf"], "unknown pipeline 'rhlf' (did you mean 'rlhf'?"),
        (["experiment=persona"], "unknown experiment 'persona' (did you mean 'persona_rlhf'?"),
        (["stages.sftt.lr=1"], "unknown stage 'sftt' (did you mean 'sft'?"),
        (["stages.sft.lrr=1"], "stages.sft.lrr: unknown option (did you mean 'stages.sft.lr'?)"),
        (["+stages.sft.lrr=1"], "stages.sft.lrr: unknown option"),
        (["adapter.rnk=1"], "adapter.rnk: unknown option (did you mean 'adapter.rank'?)"),
        (["adapter=full", "adapter.rank=1"], "adapter.rank: unknown option"),
        (["stages.sft.adapter=full", "stages.sft.adapter.rank=1"], "stages.sft.adapter.rank: unknown option"),
        (["data.conversations.limt=1"], "data.conversations.limt: unknown option (did you mean"),
        (["model.lod=nf4"], "model.lod: unknown option (did you mean 'model.load'?)"),
        (["sed=1"], "sed: unknown option (did you mean 'seed'?)"),
        (["lr=1"], "lr: unknown option (also in: reward_model, ppo); did you mean 'stages.sft.lr'?"),
        (["ppo.lr=1"], "ppo.lr: unknown option; did you mean 'stages.ppo.lr'?"),
        (["stages.sft.lr=abc"], "stages.sft.lr: expected a number (got 'abc')"),
        (["stages.sft.lr=nan"], "stages.sft.lr: expected a number (got nan)"),
        (["stages.sft.lr=true"], "stages.sft.lr: expected a number (got true)"),
        (["stages.sft.lr=[1]"], "stages.sft.lr: expected a number (got [1])"),
        (["stages.sft.epochs=null"], "stages.sft.epochs: needs a value (got null)"),
        (["stages.sft.max_steps=1.5"], "stages.sft.max_steps: expected a whole number (got 1.5)"),
        (["stages.sft.batch_size=1e3"], "stages.sft.batch_size: write 1000 (got 1000.0)"),
        (["stages.sft.batch_size=99999999999999999999"], "stages.sft.batch_size: out of range (got 9999"),
        (["adapter.dropout=1.5"], "adapter.dropout: out of range (got 1.5; expected at least 0 and less than 1)"),
        (["seed=abc"], "seed: expected a whole number (got 'abc')"),
        (["seed=9223372036854775808"], "seed: out of range (got 9223372036854775808; expected a whole number of 64"),
        (["model.load=nf5"], "model.load: unknown choice 'nf5' (did you mean 'nf4'? choices: fp32, bf16, nf4"),
        (["stages.ppo.on_parent=stac"], "stages.ppo.on_parent: unknown choice 'stac' (did you mean 'stack'?"),
        (["on_precision_change=x"], "on_precision_change: unknown choice 'x' (choices: refuse, recalibrate)"),
        (["model=hf"], "model.path: needs a value; add model.path=VALUE"),
        (["adapter=lora,vera"], "'adapter=lora,vera' sweeps over several values; align run takes them with -m"),
        (["sft"], "'sft' is not an override; overrides are KEY=VALUE"),
        (["data.path=[1"], "override 'data.path=[1' cannot be read"),
        (["name=a/b"], "name: 'a/b' is not the name of one folder"),
        (["name=.."], "name: '..' is not the name of one folder"),
        (["out="], "out: needs a folder"),
        (["stages.sft=3"], "stages.sft: a stage is a mapping of options"),
        (["stages.evaluate.adapter=vera"], "stages.evaluate.adapter: evaluate trains no adapter"),
        (["stages.sft.reward=OTHER/reward_model"], "stages.sft.reward: sft takes no reward model"),
        (["adapter.method=vera"], "adapter.method: an adapter is chosen as a whole; adapter=vera"),
        (
            ["pipeline=evaluate", "adapter.rank=3"],
            "adapter.rank: reaches no stage: no stage of this pipeline trains one",
        ),
        (
            ["pipeline=sft", "stages.sft.adapter=vera", "adapter.rank=3"],
            "adapter.rank: reaches no stage: every stage has its own; set stages.sft.adapter.rank",
        ),
        (["pipeline=sft", "stages.sft.data=files", "data.limit=3"], "data.limit: reaches no stage"),
        (["pipeline=sft", "stages.sft.lr=1e400"], "stages.sft.lr: out of range (got inf; expected a finite number)"),
        (["pipeline=sft", "stages.sft.epochs=inf"], "stages.sft.epochs: out of range (got inf; expected a finite"),
        (["name=-x"], "is not the name of one folder"),
        ([f"name={'x' * 201}"], "is not the name of one folder"),
        (["pipeline=sft", "stages.sft.lr=nan"], "stages.sft.lr: expected a number"),
        (["~stages.sft", "~stages.reward_model", "~stages.ppo", "~stages.evaluate"], "the pipeline has no stage"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(overrides, line):
    assert line in problem(*overrides)


def test_a_limit_may_be_infinite():
    (spec,) = compose(["pipeline=sft", "stages.sft.max_grad_norm=inf"]).stages
    assert spec.stage.max_grad_norm == float("inf")


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_own_recipes(tmp_path):
    write(tmp_path, "adapter/mine.yaml", "method: vera\nrank: 9\n")
    write(tmp_path, "data/mine.yaml", "name: mine\npath: rows.jsonl\nconversations:\n  path: ${..path}\n")
    write(
        tmp_path,
        "experiment/mine.yaml",
        "# @package _global_\ndefaults:\n  - override /pipeline: sft\n  - override /data: mine\nseed: 5\n"
        "stages:\n  sft:\n    lr: 3e-4\n    adapter: {method: mine, dropout: 0.1}\n",
    )
    config = compose(["experiment=mine", "stages.sft.data.path=other.jsonl"], str(tmp_path))
    spec = config.stages[0]
    assert (config.seed, spec.stage.lr, spec.adapter.method, spec.adapter.rank, spec.adapter.dropout) == (
        5, 3e-4, "vera", 9, 0.1
    )  # fmt: skip
    assert (spec.data.name, spec.data.conversations.path) == ("mine", "other.jsonl")
    assert config.command[-2:] == ["--config-dir", str(tmp_path)]
    assert by_stage("adapter=mine", "adapter.dropout=0.2", config_dir=str(tmp_path))["ppo"] == ("vera", 9)
    assert "unknown adapter 'mina' (did you mean 'mine'?" in problem("adapter=mina", config_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "text", "words", "line"),
    [
        (
            "experiment/bad.yaml",
            "# @package _global_\nstages:\n  sft:\n    lrr: 1\n",
            "experiment=bad",
            "stages.sft.lrr: unknown",
        ),
        (
            "experiment/bad.yaml",
            "# @package _global_\nsed: 1\n",
            "experiment=bad",
            "sed: unknown option (did you mean 'seed'?)",
        ),
        ("experiment/bad.yaml", "seed: 1\n", "experiment=bad", "must begin with the line '# @package _global_'"),
        ("experiment/bad.yaml", "a: [1\n", "experiment=bad", "experiment/bad.yaml:2: not valid YAML"),
        (
            "experiment/bad.yaml",
            "# @package _global_\ndefaults:\n  - override /data: smaltalk\n",
            "experiment=bad",
            "unknown data recipe 'smaltalk' (did you mean 'smalltalk'?",
        ),
        (
            "experiment/bad.yaml",
            "# @package _global_\nstages:\n  sft:\n    adapter: vera\n",
            "experiment=bad",
            "stages.sft.adapter: a recipe names it as {method: vera}",
        ),
        ("adapter/bad.yaml", "rank: 3\n", "adapter=bad", "adapter: the adapter names no method"),
        ("adapter/bad.yaml", "method: verra\n", "adapter=bad", "unknown adapter 'verra' (did you mean 'vera'?"),
        ("data/bad.yaml", "name: bad\npath: ${nowhere}\n", "data=bad", "data.path: "),
    ],
)
def test_mistakes_in_own_recipes(tmp_path, name, text, words, line):
    write(tmp_path, name, text)
    assert line in problem(words, config_dir=str(tmp_path))


def test_own_recipe_folder_must_exist(tmp_path):
    assert "no such folder" in problem(config_dir=str(tmp_path / "none"))


def test_a_recipe_s_options_do_not_make_a_stage_of_their_own():
    """An experiment for the whole chain, with a pipeline that is shorter: its SFT would be trained behind PPO."""
    words = [
        "experiment=persona_rlhf",
        "pipeline=ppo",
        "model.path=x",
        "data.root=x",
        "stages.ppo.reward=r/reward_model",
    ]
    with pytest.raises(
        UserError, match=r"stages\.sft: a recipe sets options of a stage 'sft', which the pipeline does not"
    ):
        compose(words)


def test_registering_is_all_it_takes(monkeypatch):
    monkeypatch.setattr(ConfigStore.instance(), "repo", {**ConfigStore.instance().repo})
    monkeypatch.setattr(adapters, "_choices", dict(adapters._choices))
    monkeypatch.setattr(stages, "_choices", dict(stages._choices))
    for group in ("adapter", "stage"):
        monkeypatch.setitem(ConfigStore.instance().repo, group, dict(ConfigStore.instance().repo[group]))

    @adapter("toy")
    @dataclasses.dataclass
    class Toy(Adapter):
        """A method of a test."""

        method: str = "toy"
        size: int = option(3, "size")
        lambda_: float = option(0.5, "a name that Python keeps for itself")

        def __post_init__(self):
            if self.size < 1:
                raise ValueError("size must be positive")

    @stage("toy_stage")
    @dataclasses.dataclass
    class ToyStage(TrainingStage):
        """A stage of a test."""

    config = compose(["pipeline=sft", "adapter=toy", "adapter.lambda=0.25", "+stage@stages.more=toy_stage"])
    assert [type(spec.stage) for spec in config.stages][1] is ToyStage
    assert all((spec.adapter.size, spec.adapter.lambda_) == (3, 0.25) for spec in config.stages)
    assert "adapter: size must be positive" in problem("adapter=toy", "adapter.size=0")


def test_the_caller_s_hydra_is_left_alone():
    before = GlobalHydra.instance().hydra
    compose(["pipeline=sft"])
    assert GlobalHydra.instance().hydra is before


def test_sources_are_checked_before_the_first_stage(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    check_sources(compose([]))
    check_sources(compose(["pipeline=sft", "data=files", f"data.path={tmp_path}/rows.jsonl"]))
    for overrides, line in [
        (["pipeline=sft", "data=files", f"data.path={tmp_path}/row.jsonl"], "did you mean"),
        (["data=alpaca", f"data.root={tmp_path}"], "no such file"),
        (["data=files"], "has no conversations"),
        (["pipeline=sft", "data.path=rows.jsonl"], "stages.sft.data.path: is not read"),
        (["stages.sft.data.path=rows.jsonl"], "stages.sft.data.path: is not read"),
    ]:
        with pytest.raises(UserError, match=line):
            check_sources(compose(overrides))


PATHS = ["ä.jsonl", "it's.jsonl", "a#b.jsonl", "a,b.jsonl", "a=b.jsonl", "copy (1).jsonl", "a:b;c&d!.jsonl", "a{b}$"]
PATHS += ["a 'b' \\'c\\.jsonl", "a\\", "日本/データ.jsonl", "50%  off.jsonl", "0012"]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_read_as_it_stands(path):
    from align.cli.arguments import run_folder

    config = compose(["pipeline=sft", "data=files", f"data.path={path}", f"out={path}", f"data.root={path}"])
    data = config.stages[0].data
    assert (data.path, data.root, config.out) == (path, path, path)
    assert run_folder([f"out={path}"]) == path


def test_a_comma_still_sweeps_where_it_is_asked_to_and_what_exists_is_a_path(tmp_path, monkeypatch):
    from align.cli.arguments import split_words
    from align.config.overrides import parse

    (word,) = parse(["data.path=a.jsonl,b.jsonl"], sweeps=True)
    assert word.is_sweep_override()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[draft] x=1.jsonl").write_text("{}")
    assert compose(["pipeline=sft", "data=files", "data.path=[draft] x=1.jsonl"]).stages[0].data.path
    assert split_words(["[draft] x=1.jsonl", "limit=3"], 1) == (["[draft] x=1.jsonl"], ["limit=3"])
