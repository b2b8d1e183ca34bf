"""The command answers at once: asking for help, listing and composing import no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROBE = """
import contextlib, io, json, sys
from align.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    code = main(json.loads(sys.argv[1]))
print(json.dumps([code, sorted({"torch", "transformers", "peft", "accelerate", "datasets"} & set(sys.modules))]))
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["run", "--help"], 0),
        (["ls"], 0),
        (["ls", "adapters", "--json"], 0),
        (["show", "adapter=vera"], 0),
        (["run", "adapter=lorra"], 2),
        (["run", "stages.sft.lr=abc", "--json"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_no_torch(words, code, tmp_path):
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROBE, json.dumps(words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=paths, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [code, []]
