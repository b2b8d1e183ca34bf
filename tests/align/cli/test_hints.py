"""A hint that is obeyed leads on: what a refusal advises is done, and works."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

from align.cli.dispatch import main
from tests.tiny_chain import finished, made, pipeline_words, refused


def told(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of a refusal."""
    capfd.readouterr()
    code = main(list(words))
    return refused(code, capfd.readouterr().err)


def obeyed(command: str, *more: str) -> int:
    """The exit code of an advised command; standard input has one message."""
    keyboard, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(b"say owl\n"))
    try:
        return main([*command.split()[1:], *more])
    finally:
        sys.stdin = keyboard


def test_a_stage_whose_file_was_changed_is_trained_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["run", *pipeline_words("sft", "name=n"), f"out={tmp_path}"]
    assert main(words) == 0
    stage = tmp_path / "n" / "sft"
    (stage / "adapter_config.json").write_text("{}")
    line = told(capfd, *words)
    assert "content changed" in line and "move the stage's folder away" in line
    stage.rename(tmp_path / "away")
    assert main(words) == 0 and (stage / "checkpoint.json").is_file()


@pytest.mark.parametrize(("method", "verb"), [("prompt", "export"), ("bottleneck", "chat")])
def test_what_cannot_be_merged_is_served(
    method: str, verb: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stage = made("sft", f"adapter={method}", "name=n", out=tmp_path) / "sft"
    line = told(capfd, "merge", str(stage), f"to={tmp_path / 'm'}")
    command = line.split("beside its base: ")[1]
    assert command.startswith(f"align {verb} ")
    assert obeyed(command, "max_new_tokens=4" if verb == "chat" else f"to={tmp_path / 'out'}") == 0


def test_an_adapter_is_not_extracted_but_compressed_or_exported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = told(capfd, "extract", str(finished() / "sft"), "rank=2", f"to={tmp_path / 'x'}")
    lower, plain = re.findall(r"align \w+ \S+ \w+=\w+", line)
    assert obeyed(lower.replace("=N", "=8"), f"to={tmp_path / 'a'}", "--force") == 0
    assert obeyed(plain, f"to={tmp_path / 'b'}") == 0


def test_a_full_fine_tune_of_an_adapter_is_extracted_from_its_merged_parent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["adapter=full", f"stages.sft.init={finished() / 'sft'}", "name=n"]
    stage = made("sft", *words, out=tmp_path) / "sft"
    line = told(capfd, "extract", str(stage), "rank=4", f"to={tmp_path / 'x'}")
    (merge,) = re.findall(r"align merge \S+ to=FOLDER", line)
    assert obeyed(merge.replace("FOLDER", str(tmp_path / "parent"))) == 0
    assert main(["extract", str(stage), "rank=4", f"to={tmp_path / 'x'}", f"base={tmp_path / 'parent'}"]) == 0


def test_a_sweep_is_a_matter_of_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`check` has no -m, so that "add -m" would not do."""
    line = told(capfd, "run", *pipeline_words("sft", "name=n", "adapter=lora,vera"), f"out={tmp_path}")
    assert line.endswith("sweeps over several values; align run takes them with -m")
