"""Where each value was set, recipes that may name no code, and copying a recipe to start one's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from align.cli import dispatch as cli
from align.config.compose import compose, explain
from data_prep.core.errors import UserError


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


EXPERIMENT = """\
# @package _global_
defaults:
  - override /pipeline: rlhf
  - override /adapter: lora_r32

seed: 3
adapter:
  dropout: 0.1
stages:
  sft:
    lr: 1e-3
    adapter: {method: lora_r64, alpha: 4.0}
  reward_model:
    adapter:
      rank: 8
"""


def test_every_value_has_its_origin(tmp_path):
    mine = write(tmp_path, "experiment/mine.yaml", EXPERIMENT)
    config, origins = explain(["experiment=mine", "stages.ppo.kl_coef=0.3", "stages.ppo.data=files"], str(tmp_path))
    values = {}

    def flatten(node, above):
        for key, value in node.items():
            path = f"{above}.{key}" if above else key
            if isinstance(value, dict) and value:
                flatten(value, path)
            else:
                values[path] = value

    flatten(config.resolved, "")
    assert set(origins) == set(values)
    expected = {
        "pipeline": (f"{mine}:3", "rlhf"),
        "seed": (f"{mine}:6", 3),
        "out": ("recipes/config.yaml:{row}", "runs"),
        "name": ("the pipeline and the digest of all that decides the result", config.name),
        "model.path": ("recipes/model/nano.yaml:{row}", "package:nano"),
        "model.revision": ("default of ModelOptions", None),
        "tracking.to": ("default of TrackingOptions", []),
        "stages.sft.stage": ("recipes/pipeline/rlhf.yaml:{row}", "sft"),
        "stages.sft.lr": (f"{mine}:11", 1e-3),
        "stages.sft.epochs": ("default of SFT", compose([]).stages[0].stage.epochs),
        "stages.sft.adapter.method": (f"{mine}:12", "lora"),
        "stages.sft.adapter.alpha": (f"{mine}:12", 4.0),
        "stages.sft.adapter.rank": ("recipes/adapter/lora_r64.yaml:{row}", 64),
        "stages.sft.adapter.dropout": ("default of Lora", 0.0),
        "stages.reward_model.adapter.rank": (f"{mine}:15", 8),
        "stages.reward_model.adapter.alpha": ("recipes/adapter/lora_r32.yaml:{row}", 64.0),
        "stages.reward_model.adapter.method": (f"{mine}:4", "lora"),
        "stages.ppo.adapter.dropout": (f"{mine}:8", 0.1),
        "stages.ppo.kl_coef": ("command line", 0.3),
        "stages.ppo.data.name": ("command line", "files"),
        "stages.ppo.data.path": ("recipes/data/files.yaml:{row}", None),
        "stages.ppo.data.gold.rule": ("default of GoldOptions", None),
        "stages.sft.data.conversations.options.noise": ("recipes/data/smalltalk.yaml:{row}", 0.05),
    }
    for path, (place, value) in expected.items():
        assert values[path] == value, path
        found = origins[path]
        if "{row}" in place:
            file, _, row = found.rpartition(":")
            assert file == place.partition(":")[0], path
            line = Path(file).read_text().splitlines()[int(row) - 1]
            assert path.rpartition(".")[2] in line, "the line says it"
        else:
            assert found == place, path


def test_the_command_line_beats_files_and_what_it_replaces_is_forgotten(tmp_path):
    write(tmp_path, "experiment/mine.yaml", EXPERIMENT)
    words = ["experiment=mine", "adapter=vera", "stages.sft.adapter=lora_r32", "seed=4", "~stages.evaluate"]
    config, origins = explain(words, str(tmp_path))
    methods = {spec.name: (spec.adapter.method, spec.adapter.rank) for spec in config.stages}
    assert methods == {"sft": ("lora", 32), "reward_model": ("vera", 8), "ppo": ("vera", 256)}
    assert origins["seed"] == origins["stages.sft.adapter.method"] == origins["stages.ppo.adapter.method"]
    assert origins["seed"] == "command line"
    assert origins["stages.sft.adapter.rank"].startswith("recipes/adapter/lora_r32.yaml:")
    assert origins["stages.ppo.adapter.rank"] == "default of Vera"


def refusal(*words, folder=None):
    with pytest.raises(UserError) as caught:
        compose(list(words), str(folder) if folder else None)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "row", "line"),
    [
        ("experiment/mine.yaml", "stages:\n  sft:\n    lrr: 1\n", 4, "stages.sft.lrr: unknown option (did you mean"),
        ("experiment/mine.yaml", "sed: 1\n", 2, "sed: unknown option (did you mean 'seed'?)"),
        ("experiment/mine.yaml", "stages:\n  sft: {lr: fast}\n", 3, "stages.sft.lr: expected a number (got 'fast')"),
        ("experiment/mine.yaml", "\nmodel:\n  load: nf5\n", 4, "model.load: unknown choice 'nf5' (did you mean 'nf4'?"),
        (
            "experiment/mine.yaml",
            "adapter: {rnk: 3}\n",
            2,
            "adapter.rnk: unknown option (did you mean 'adapter.rank'?)",
        ),
        (
            "experiment/mine.yaml",
            "tracking: {to: [wandbb]}\n",
            2,
            "tracking.to: unknown tracker 'wandbb' (did you mean",
        ),
        (
            "experiment/mine.yaml",
            "stages:\n  ppo:\n    adapter: {method: lora_r64, rnk: 1}\n",
            4,
            "stages.ppo.adapter.rnk: unknown option",
        ),
        (
            "experiment/mine.yaml",
            "stages:\n  sft:\n    adapter: {method: verra}\n",
            4,
            "unknown adapter 'verra' (did you",
        ),
        ("experiment/mine.yaml", "defaults:\n  - override /data: smaltalk\n", 3, "(did you mean 'smalltalk'?"),
        ("experiment/mine.yaml", "defaults:\n  - /modle: nano\n", 3, "unknown group 'modle' (did you mean 'model'?"),
        (
            "experiment/mine.yaml",
            "data:\n  conversations:\n    options:\n      limt: [1, '${now:}']\n",
            5,
            "data.conversations.options.limt: unknown resolver 'now' (choices: oc.env",
        ),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_line(tmp_path, name, text, row, line):
    path = write(tmp_path, name, f"# @package _global_\n{text}")
    told = refusal("experiment=mine", folder=tmp_path)
    assert told.startswith(f"{path}:{row}:") and line in told


def test_a_mistake_in_a_preset_of_a_stage_is_told_with_its_line(tmp_path):
    path = write(tmp_path, "adapter/mine.yaml", "method: lora\nrnk: 3\n")
    assert refusal("stages.ppo.adapter=mine", folder=tmp_path).startswith(f"{path}:2:stages.ppo.adapter.rnk: unknown")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["adapter=lorra"], "unknown adapter 'lorra' (did you mean 'lora'?"),
        (["stages.sftt.lr=1"], "unknown stage 'sftt' (did you mean 'sft'?"),
        (["sed=1"], "sed: unknown option (did you mean 'seed'?)"),
        (["stages.sft.lr=abc"], "stages.sft.lr: expected a number (got 'abc')"),
        (["stages.sft.batch_size=0"], "stages.sft.batch_size: out of range (got 0; expected at least 1)"),
        (["data.conversations.options={styles: 1}", "adapter.rnk=1"], "adapter.rnk: unknown option"),
        (["modle/x=1"], "unknown group 'modle' (did you mean 'model'?"),
        (["model.revision=${oc.env:ALIGN_NO_SUCH_VARIABLE}"], "the environment variable ALIGN_NO_SUCH_VARIABLE is not"),
    ],
)
def test_a_mistake_that_was_typed_says_so(words, line):
    told = refusal(*words)
    assert told.startswith("command line:") and line in told


BUILDS = "would build an object from an import path; only registered names are built"


@pytest.mark.parametrize("key", ["_target_", "_recursive_", "_partial_", "_convert_", "_args_"])
@pytest.mark.parametrize(
    "where", ["model", "data.conversations.options", "stages.sft", "hydra.launcher", "model.config"]
)
def test_nothing_on_the_command_line_names_code(key, where):
    assert f"{where}.{key}: {BUILDS}" in refusal(f"{where}.{key}=os.system")
    assert f"{where}.x.{key}: {BUILDS}" in refusal("+" + where + ".x={" + key + ": os.system}")
    assert f"{where}.x: {BUILDS}" in refusal(where + ".x={" + key + ": os.system},{y: 1}"), "in a sweep too"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("experiment/bad.yaml", "# @package _global_\nmodel: {_target_: os.system}\n", ["experiment=bad"]),
        ("experiment/bad.yaml", "# @package _global_\nmodel: {config: {x: [{_target_: a}]}}\n", ["experiment=bad"]),
        ("data/bad.yaml", "name: bad\nconversations:\n  options:\n    _target_: os.system\n", ["data=bad"]),
        ("data/bad.yaml", "name: bad\nconversations:\n  options: {_target_: a}\n", ["stages.ppo.data=bad"]),
        ("adapter/bad.yaml", "method: lora\n_recursive_: false\n", ["adapter=bad"]),
        ("model/bad.yaml", "name: x\npath: y\nconfig: {_partial_: true}\n", ["model=bad"]),
    ],
)
def test_nothing_in_a_recipe_names_code(tmp_path, name, text, words):
    write(tmp_path, name, text)
    assert BUILDS in refusal(*words, folder=tmp_path)


def test_recipes_cannot_make_hydra_build_anything_of_their_own(tmp_path):
    launcher = "# @package _global_\nhydra:\n  launcher: {_target_: os.system}\n"
    write(tmp_path, "experiment/bad.yaml", launcher)
    assert "hydra: would build 'os.system'; launchers and sweepers are chosen by name" in refusal(
        "experiment=bad", folder=tmp_path
    )
    callback = "# @package _global_\nhydra:\n  callbacks:\n    x: {_target_: os.system}\n"
    write(tmp_path, "experiment/bad.yaml", callback)
    assert "hydra: would build 'os.system'" in refusal("experiment=bad", folder=tmp_path)
    assert "hydra.searchpath: recipes come from one folder" in refusal("hydra.searchpath=[file:///tmp]")
    write(tmp_path, "hydra/launcher/mine.yaml", "_target_: os.system\n")
    assert "a folder of recipes cannot bring settings of Hydra" in refusal(folder=tmp_path)


def test_interpolations_point_at_values_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_TEST_REVISION", "v1")
    write(tmp_path, "model/mine.yaml", "name: mine\npath: ${.name}-base\nrevision: ${oc.env:ALIGN_TEST_REVISION}\n")
    config = compose(["model=mine", "pipeline=sft"], str(tmp_path))
    assert (config.model.path, config.model.revision) == ("mine-base", "v1")
    assert config.resolved["model"]["revision"] == "v1", "what is recorded is the value"
    write(tmp_path, "model/bad.yaml", "name: bad\npath: x\nconfig: \"${oc.create:'{_target_: a}'}\"\n")
    assert "bad.yaml:3:model.config: unknown resolver 'oc.create'" in refusal("model=bad", folder=tmp_path)
    assert "unknown resolver 'oc.env2' (did you mean 'oc.env'?" in refusal("model.path=${oc.env2:HOME}")


def answer(capfd, *words):
    """(exit code, JSON object) of a command."""
    capfd.readouterr()
    code = cli.main([*words, "--json"])
    return code, json.loads(capfd.readouterr().out)


def test_show_prints_values_with_their_origins(capfd):
    words = ["pipeline=sft", "adapter=vera", "stages.sft.lr=1e-3"]
    code, shown = answer(capfd, "show", *words)
    config, origins = explain(words)
    assert code == 0 and shown["recipe"] == config.resolved and shown["origins"] == origins
    assert cli.main(["show", *words]) == 0
    out = capfd.readouterr().out
    assert yaml.safe_load(out) == config.resolved, "what is printed is a recipe"
    (line,) = [line for line in out.splitlines() if line.split("#")[0].strip().startswith("lr:")]
    assert line.endswith("# command line")


def test_ls_lists_every_kind(capfd):
    code, listed = answer(capfd, "ls")
    assert code == 0
    named = {kind: {row["name"] for row in rows} for kind, rows in listed.items()}
    assert named["trackers"] == {"wandb", "tensorboard", "trackio"}
    assert {"lora", "vera", "full", "qlora"} <= named["adapters"] and {"sft", "ppo"} <= named["stages"]
    assert "known_reply" in named["rules"] and "alpaca" in named["formats"] and "model=nano" in named["models"]
    assert "experiment=persona_rlhf" in named["recipes"] and "data=smalltalk" in named["data"] and "runs" in named
    assert all(row["summary"] for kind, rows in listed.items() for row in rows if kind != "runs")


@pytest.mark.parametrize("recipe", ["persona_rlhf", "experiment/nano_pretrain", "rlhf", "data=alpaca", "lora_r32"])
def test_a_copied_recipe_runs_as_the_original(tmp_path, capfd, recipe):
    code, made = answer(capfd, "cp", recipe, str(tmp_path / "own"), "--as", "mine")
    assert code == 0 and made["recipe"].endswith("=mine")
    words = made["next"]
    assert words[:2] == ["align", "run"] and words[-2:] == ["--config-dir", str(tmp_path / "own")]
    given = [word for word in words[2:-2] if word != made["recipe"]]
    assert given == [f"{key}=VALUE" for key in made["missing"]]
    group = made["recipe"].partition("=")[0]
    original = recipe.replace("=", "/").rpartition("/")[2]
    ours, origins = explain(words[2:-2], words[-1])
    theirs = compose([f"{group}={original}", *given])
    decided = {key: value for key, value in ours.resolved.items() if key not in ("pipeline", "name")}
    assert decided == {key: value for key, value in theirs.resolved.items() if key not in ("pipeline", "name")}
    copied = [place for place in origins.values() if place.startswith(str(tmp_path))]
    assert copied and f"{group}/mine.yaml" in " ".join(copied)


def test_an_experiment_brings_all_that_it_names(tmp_path, capfd):
    _, made = answer(capfd, "cp", "persona_rlhf", str(tmp_path))
    copied = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.yaml")}
    names = ["experiment/persona_rlhf", "pipeline/rlhf", "data/persona", "model/hf", "adapter/lora_r32"]
    assert copied == {f"{name}.yaml" for name in names}
    assert made["missing"] == ["model.path", "data.root"]


def test_copying_overwrites_nothing(tmp_path, capfd):
    held = write(tmp_path, "data/persona.yaml", "mine\n")
    code, made = answer(capfd, "cp", "persona_rlhf", str(tmp_path))
    assert code == 2 and made["error"]["file"] == str(held)
    assert "is there already, and nothing was copied" in made["error"]["message"]
    assert held.read_text() == "mine\n"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [held]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["persona_rlfh", "DIR"], "unknown recipe 'persona_rlfh' (did you mean 'persona_rlhf'?"),
        (["dat/persona", "DIR"], "unknown group 'dat' (did you mean 'data'?"),
        (["data/persna", "DIR"], "unknown recipe 'persna' (did you mean 'persona'?"),
        (["lora", "DIR"], "adapter=lora is a registered adapter, not a file"),
        (["persona_rlhf"], "cp needs a RECIPE and a DIR"),
        (["persona_rlhf", "DIR", "more"], "unexpected 'more'"),
        (["persona_rlhf", "DIR", "--as", "a/b"], "'a/b' is not the name of one folder"),
    ],
)
def test_mistakes_in_copying_are_one_line(tmp_path, capfd, words, line):
    code, made = answer(capfd, "cp", *[str(tmp_path) if word == "DIR" else word for word in words])
    assert code == 2 and line in made["error"]["message"]
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_told_with_its_place_without_torch():
    code = "import sys; from align.cli import main; main(['show', 'adapter.rnk=1']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.split(":")[:2]) == (0, ["align", " command line"])
