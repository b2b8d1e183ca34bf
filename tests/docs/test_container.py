"""The Dockerfile, without Docker: what it copies is there enough to build from, and it installs what was tested."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

tomllib = pytest.importorskip("tomllib")  # came with Python 3.11
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
LINES = [
    tuple(line.split(" ", 1))
    for line in (ROOT / "Dockerfile").read_text("utf-8").splitlines()
    if line and not line.startswith("#")
]
RUN = [text for word, text in LINES if word == "RUN"]


def copied():
    """(from, to) of everything that is copied, of one COPY each."""
    for word, text in LINES:
        if word == "COPY":
            *sources, to = text.split()
            yield from ((source, to) for source in sources)


def values(word):
    return [text for name, text in LINES if name == word]


def test_every_line_is_known_and_the_command_is_align():
    assert {word for word, _ in LINES} == {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD"}
    (entry,) = json.loads(values("ENTRYPOINT")[0])
    assert entry in PROJECT["project"]["scripts"] and json.loads(values("CMD")[0]) == ["--help"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", values("USER")[0]), "not root"


def test_python_is_one_that_the_tested_versions_are_for():
    version = re.fullmatch(r"python:(\d\.\d+)-slim", values("FROM")[0])[1]
    lowest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert tuple(map(int, version.split("."))) >= tuple(map(int, lowest.split(".")))
    pins = (ROOT / "constraints.txt").read_text("utf-8")
    assert re.search(rf'^numpy==\S+; python_version >= "{re.escape(version)}"$', pins, re.MULTILINE)


def test_what_is_copied_is_there_and_comes_through_dockerignore():
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").split() if line.startswith("!")}
    sources = {source for source, _ in copied()}
    assert sources == let_in and all((ROOT / source).exists() for source in sources)
    for source, to in copied():
        assert to == (f"./{source}" if (ROOT / source).is_dir() else "./"), "a folder is copied under its own name"


def test_what_is_installed_is_pinned_and_its_extras_exist():
    installs = [shlex.split(line) for line in RUN if line.startswith("pip install")]
    assert len(installs) == 2 and all(words[2:4] == ["--constraint", "constraints.txt"] for words in installs)
    assert installs[0][-1] == "torch" and re.search(r"^torch==", (ROOT / "constraints.txt").read_text("utf-8"), re.M)
    assert installs[0][5] == "https://download.pytorch.org/whl/${TORCH}" and values("ARG") == ["TORCH=cpu"]
    extras = re.fullmatch(r"\.\[([\w,]+)\]", installs[1][-1])[1].split(",")
    assert set(extras) <= set(PROJECT["project"]["optional-dependencies"])


@pytest.mark.parametrize("line", RUN)
def test_a_step_runs_as_far_as_it_can_without_a_network(line, tmp_path):
    """pip builds the project from the copied files alone, without its dependencies; no step names another program."""
    for source, to in copied():
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, tmp_path / to / ("" if to != "./" else source))
    if line.startswith("mkdir"):
        line = line.replace("/work", str(tmp_path / "work"))
    elif line.endswith("torch"):
        pytest.skip("fetches torch")
    else:
        pytest.importorskip("setuptools", minversion="77")
    target = tmp_path / "installed"
    fetch_nothing = f"--no-deps --no-index --no-build-isolation --target {shlex.quote(str(target))}"
    line = line.replace("pip install", f"{shlex.quote(sys.executable)} -m pip install {fetch_nothing}")
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if line.startswith("mkdir"):
        assert (tmp_path / "work").stat().st_mode & 0o7777 == 0o1777
    else:
        assert {path.name for path in target.iterdir()} >= {"align", "data_prep", "reward"}
        for name in ("align/recipes/config.yaml", "align/models/nano/model.safetensors", "align/cli/completion.fish"):
            assert Path(target, name).is_file(), f"the package lacks {name}"
