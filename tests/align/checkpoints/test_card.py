"""README.md of a stage's folder: base, licence, data, and code that loads the folder; its files are for everyone."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import pytest

from align.checkpoints.checkpoint import Checkpoint
from tests.tiny_chain import base, finished, made


def card(folder: Path) -> str:
    return (folder / "README.md").read_text("utf-8")


def ran(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What each block of code of a folder's README prints, run in that folder."""
    monkeypatch.chdir(folder)
    said = []
    for code in re.findall(r"```python\n(.*?)```", card(folder), re.DOTALL):
        code = re.sub(r'^base = ".*$', f"base = {str(base())!r}", code, flags=re.MULTILINE)
        capsys.readouterr()
        exec(compile(code, "README.md", "exec"), {})
        said.append(capsys.readouterr().out.strip())
    return said


@pytest.mark.parametrize("stage", ["sft", "ppo", "reward_model"])
def test_the_code_runs_in_the_folder(stage, monkeypatch, capsys):
    folder = finished() / stage
    said = ran(folder, monkeypatch, capsys)
    if Checkpoint.open(folder).role == "reward":
        assert len(said) == 1 and len(json.loads(said[0])) == 1 and "form=sequence_classification" in card(folder)
    else:
        assert len(said) == 2 and said[0] == said[1], "both ways to load it say the same"


def test_it_names_base_licence_and_data(monkeypatch):
    for stage in ("sft", "ppo", "reward_model", "ppo/value"):
        text = card(finished() / stage)
        assert f"base_model: {base().name}\n" in text and str(base()) not in text.split("Made by")[0]
        assert "Licence of the base" in text and "| sft | conversations.jsonl" in text, stage
    assert "stages.ppo.critic=parent" in card(finished() / "ppo/value")


def test_a_whole_model_is_loaded_without_this_toolkit(tmp_path, monkeypatch, capsys):
    before = os.umask(0o022)
    try:
        run = made("sft", "adapter=full", "name=n", out=tmp_path)
    finally:
        os.umask(before)
    said = ran(run / "sft", monkeypatch, capsys)
    assert len(said) == 2 and said[0] == said[1]
    assert "library_name: transformers" in card(run / "sft")
    for path in [path for path in run.rglob("*") if path.is_file()]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o644, path


def test_what_no_stock_model_computes_is_said(tmp_path):
    text = card(made("sft", "adapter=bottleneck", "name=n", out=tmp_path) / "sft")
    assert "```python" not in text and "align chat ." in text


def test_a_stacked_adapter_is_not_loaded_onto_the_bare_base(tmp_path):
    words = ["adapter=lora", f"stages.sft.init={finished() / 'sft'}", "stages.sft.on_parent=stack", "name=n"]
    text = card(made("sft", *words, out=tmp_path) / "sft")
    assert "align.load" in text and "PeftModel" not in text and "align export ." in text


def test_the_embedded_base_has_a_licence():
    from align.checkpoints.card import base_name, licence_of
    from align.models.location import model_folder

    assert licence_of(model_folder("package:nano")) == "apache-2.0" and base_name("package:nano") == "nano"
