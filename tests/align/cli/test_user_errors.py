"""What users get wrong: one line and exit code 2, or a documented choice that is counted. Nothing saved is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from align.cli.dispatch import main
from align.planning.check import check
from tests.tiny import save_tiny_llama, write_jsonl
from tests.tiny_chain import (
    HOME,
    base,
    checkpoint,
    compose,
    copied,
    data_words,
    finished,
    made,
    own_data,
    pipeline_words,
    read,
    refused,
    run,
    sft,
    talk,
)


# ---------------------------------------- models
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("{tmp}/nothere", "does not exist"),
        ("./nothere", "does not exist"),
        ("package:nono", "no embedded model"),
        ("org/nothere", "hub"),
        ("'org/na me'", ""),
        ("org/nothere/deeper", "does not exist"),
        ("{tmp}/file.txt", ""),
    ],
)
def test_a_model_that_is_not_there(path, said, tmp_path, capfd):
    (tmp_path / "file.txt").write_text("x")
    code, err = run(capfd, *sft(tmp_path), f"model.path={path.format(tmp=tmp_path)}")
    assert said in refused(code, err)


def test_a_misspelt_folder_is_guessed(tmp_path, capfd):
    model = save_tiny_llama(tmp_path / "my-model")
    code, err = run(capfd, *sft(tmp_path, model=tmp_path / "my-modle"))
    assert str(model) in refused(code, err)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_folder_with_a_hole(missing, tmp_path, capfd):
    model = Path(shutil.copytree(base(), tmp_path / "base"))
    (model / missing).unlink()
    code, err = run(capfd, *sft(tmp_path, model=model))
    assert missing.partition(".")[0].split(".")[0] in refused(code, err) or "safetensors" in err


def test_damaged_and_pickled_weights(tmp_path, capfd):
    model = Path(shutil.copytree(base(), tmp_path / "base"))
    weights = (model / "model.safetensors").read_bytes()
    for content in (b"", b"\xff" * 40, weights[:200], weights[:-1000]):
        (model / "model.safetensors").write_bytes(content)
        assert "safetensors" in refused(*run(capfd, *sft(tmp_path, model=model)))
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "pickled" in refused(*run(capfd, *sft(tmp_path, model=model)))
    (model / "config.json").write_text("{", encoding="utf-8")
    assert "JSON" in refused(*run(capfd, *sft(tmp_path, model=model)))


def test_an_architecture_nobody_knows(tmp_path, capfd):
    model = Path(shutil.copytree(base(), tmp_path / "base"))
    config = read(model / "config.json")
    (model / "config.json").write_text(json.dumps({**config, "model_type": "nosuch"}), encoding="utf-8")
    refused(*run(capfd, *sft(tmp_path, model=model)))


def test_code_in_a_model_folder_never_runs(tmp_path, capfd):
    model = Path(shutil.copytree(base(), tmp_path / "base"))
    config = read(model / "config.json")
    auto = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Config"}
    (model / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": auto}), "utf-8")
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    refused(*run(capfd, *sft(tmp_path, model=model)))
    assert not (tmp_path / "ran").exists()


def test_a_hub_id_without_a_network_is_one_line(tmp_path):
    """In a process of its own, with a home of its own: nothing is cached and the variable is read at import."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[3])
    words = ["run", "pipeline=sft", "model=hf", "model.path=org/some-model", *data_words(), f"out={tmp_path}"]
    program = [sys.executable, "-c", "import sys; from align.cli import main; sys.exit(main(sys.argv[1:]))"]
    done = subprocess.run(
        [*program, *words], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240
    )
    line = refused(done.returncode, done.stderr)
    assert "org/some-model" in line and "model.path" in line and done.stdout == ""
    assert "HF_HUB_OFFLINE" in line, "what its client says is told to its end"


# ---------------------------------------- data
def test_missing_and_empty_data(tmp_path, capfd):
    assert "nothere.jsonl" in refused(*run(capfd, *sft(tmp_path, "data.conversations.path=/nothere.jsonl")))
    (tmp_path / "empty.jsonl").write_text("")
    refused(*run(capfd, *sft(tmp_path, f"data.conversations.path={tmp_path / 'empty.jsonl'}")))
    (tmp_path / "blank.jsonl").write_text("\n\n  \n")
    refused(*run(capfd, *sft(tmp_path, f"data.conversations.path={tmp_path / 'blank.jsonl'}")))
    assert not (tmp_path / "n" / "sft").exists()


def test_a_missing_file_of_a_later_stage_is_found_before_the_first(tmp_path, capfd):
    words = [*pipeline_words("rlhf", "name=n", "data.preferences.path=/nothere.jsonl"), f"out={tmp_path}"]
    assert "/nothere.jsonl" in refused(*run(capfd, *words))
    assert not (tmp_path / "n" / "sft").exists()


def test_an_unknown_role_names_file_row_and_the_nearest(tmp_path, capfd):
    rows = talk()
    rows[4]["messages"][1]["role"] = "asistant"
    line = refused(*run(capfd, *sft(tmp_path, *own_data(tmp_path / "t.jsonl", rows))))
    assert "t.jsonl:5" in line and "asistant" in line and "assistant" in line.replace("asistant", "")


BAD: list[dict[str, Any]] = [
    {"messages": []},
    {"messages": [{"role": "user", "content": "alone"}]},
    {"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]},
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]},
    {"messages": "text"},
    {"other": 1},
]


@pytest.mark.parametrize("row", BAD)
def test_bad_rows_are_refused(row, tmp_path, capfd):
    rows = talk()
    rows.insert(6, row)
    line = refused(*run(capfd, *sft(tmp_path, *own_data(tmp_path / "t.jsonl", rows))))
    assert "t.jsonl:7" in line


def test_bad_rows_are_left_out_and_counted_where_that_is_asked_for(tmp_path, capfd):
    rows = talk()
    for place, row in enumerate(BAD):
        rows.insert(3 * place + 1, row)
    words = sft(tmp_path, *own_data(tmp_path / "t.jsonl", rows), "data.conversations.on_bad_row=drop")
    assert run(capfd, *words)[0] == 0
    card = read(tmp_path / "n" / "sft" / "data_card.json")["rows"]
    assert (card["in"], card["kept"], sum(card["dropped"].values())) == (30, 24, len(BAD))


def test_broken_json_names_the_line(tmp_path, capfd):
    path = write_jsonl(tmp_path / "t.jsonl", talk())
    path.write_text(path.read_text("utf-8") + '{"messages": [\n', encoding="utf-8")
    assert "t.jsonl:25" in refused(*run(capfd, *sft(tmp_path, f"data.conversations.path={path}")))


def test_identical_sides_are_refused(tmp_path, capfd):
    rows = [{"prompt": f"p {i}", "chosen": "same", "rejected": "same" if i == 3 else "other"} for i in range(20)]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    words = [*pipeline_words("reward_model", "name=n", f"data.preferences.path={path}"), f"out={tmp_path}"]
    assert "p.jsonl:4" in refused(*run(capfd, *words))


# ---------------------------------------- names and values
@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("adapter=lorra", "lora"),
        ("stages.sft.adapter=verra", "vera"),
        ("pipeline=stf", "sft"),
        ("stages.stf.lr=1", "sft"),
        ("stages.sft.lrr=1e-4", "stages.sft.lr"),
        ("adapter.rnak=8", "adapter.rank"),
        ("stages.sft.on_parent=stck", "stack"),
        ("stages.sft.schedule=cosin", "cosine"),
        ("data=smaltalk", "smalltalk"),
        ("model=nan", "nano"),
        ("data.conversations.pth=x", "path"),
        ("model.load=nf44", "nf4"),
        ("sed=1", "seed"),
        ("data.conversations.format=alpacca", "alpaca"),
        ("data.conversations.on_bad_row=dropp", "drop"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(word, nearest, tmp_path, capfd):
    assert nearest in refused(*run(capfd, *sft(tmp_path), word))
    assert not (tmp_path / "n" / "sft").exists()


def test_ppo_without_a_reward_model_and_with_too_few_prompts(tmp_path, capfd):
    chain = finished()
    words = pipeline_words("ppo", "name=n", f"stages.ppo.init={chain / 'sft'}", f"out={tmp_path}")
    assert "stages.ppo.reward" in refused(*run(capfd, *words))
    words += [f"stages.ppo.reward={chain / 'reward_model'}", "stages.ppo.batch_size=500"]
    assert "500" in refused(*run(capfd, *words))


@pytest.mark.parametrize("target", ["chian/sft", "nothere/sft", "{chain}/sfft", "{chain}"])
def test_a_parent_that_is_not_there(target, tmp_path, capfd):
    chain = finished()
    words = [f"stages.ppo.reward={chain / 'reward_model'}", "name=n", f"out={tmp_path}"]
    code, err = run(capfd, *pipeline_words("ppo", f"stages.ppo.init={target.format(chain=chain)}", *words))
    if target == "{chain}":  # a run stands for its last policy
        assert code == 0
        return
    line = refused(code, err)
    assert target.split("/")[-1] in line
    if "sfft" in target:
        assert "did you mean" in line


def test_a_name_that_the_locale_cannot_spell(tmp_path, capfd):
    code, err = run(capfd, *sft(tmp_path), "name=\udcc3\udcbc")
    assert "'name=\\udcc3\\udcbc' is no text in this locale; set LC_ALL=C.UTF-8" in refused(code, err)
    assert not list(tmp_path.rglob("run.json"))


@pytest.mark.parametrize("verb", ["verify", "lineage", "eval"])
def test_targets_that_are_not_there(verb, tmp_path, capfd):
    run_folder = copied(finished(), tmp_path)
    capfd.readouterr()
    for target in ("nothere", run_folder.name[:-1] + "x", f"{run_folder.name}/evaluat", ""):
        code = main([verb, target, f"out={tmp_path}"])
        refused(code, capfd.readouterr().err)


# ---------------------------------------- the folder
def test_a_file_in_place_of_the_output_folder(tmp_path, capfd):
    (tmp_path / "file").write_text("mine")
    assert "file" in refused(*run(capfd, *sft(tmp_path / "file")))
    (tmp_path / "n").write_text("mine")
    refused(*run(capfd, *sft(tmp_path)))
    assert (tmp_path / "file").read_text() == (tmp_path / "n").read_text() == "mine"
    for words in (sft(tmp_path / "file"), sft(tmp_path)):
        assert any(
            "is a file, where the run's folder is to be" in line for line in map(str, check(compose(words)).problems)
        )


@cache
def tuned() -> Path:
    """A run of SFT alone; never to be changed in place."""
    return made("sft", "name=n", out=HOME / "tuned")


FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize("at", ["adapter", "record", "metrics", "recipe"])
def test_a_full_disk_is_one_line_and_loses_nothing(at, tmp_path, capfd, monkeypatch):
    """ENOSPC at each kind of write; the finished stage before it stays, and the same command goes on."""
    import errno

    import safetensors.torch
    from safetensors import SafetensorError

    copied(tuned(), tmp_path)
    before = (tmp_path / "n" / "sft" / "adapter_model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise SafetensorError(FULL) if at == "adapter" else OSError(errno.ENOSPC, "No space left on device")

    original_write, original_open = Path.write_text, Path.open

    def write_text(self, *args, **kwargs):
        name = {"record": "checkpoint.json", "recipe": "recipe.yaml"}.get(at, "?")
        return full() if name in self.name and "reward_model" in str(self) else original_write(self, *args, **kwargs)

    def opened(self, mode="r", *args, **kwargs):
        return full() if at == "metrics" and mode == "a" else original_open(self, mode, *args, **kwargs)

    if at == "adapter":
        for module in ("peft.peft_model", "peft.utils.save_and_load", "align.training.saving", "safetensors.torch"):
            found = sys.modules.get(module)
            for name in ("safe_save_file", "save_file"):
                if hasattr(found, name):
                    monkeypatch.setattr(found, name, full)
        assert safetensors.torch.save_file is full
    else:
        monkeypatch.setattr(Path, "write_text", write_text)
        monkeypatch.setattr(Path, "open", opened)
    words = [*pipeline_words("reward_model", "name=n", "stages.reward_model.init=n/sft"), f"out={tmp_path}"]
    line = refused(*run(capfd, *words))
    assert "space" in line
    assert (tmp_path / "n" / "sft" / "adapter_model.safetensors").read_bytes() == before
    assert not (tmp_path / "n" / "reward_model").exists()
    monkeypatch.undo()
    assert run(capfd, *words)[0] == 0
    checkpoint(tmp_path / "n", "sft").check_files()


def test_two_processes_on_one_run_folder(tmp_path, capfd):
    import fcntl

    (tmp_path / "n").mkdir()
    with (tmp_path / "n" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process" in refused(*run(capfd, *sft(tmp_path)))
