"""Worker processes of a script that was not written for them."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

from data_prep.prepare.workers import RARELY, rendered

SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
print("the script runs", flush=True)
from data_prep.prepare import workers
from data_prep.prepare.prepare import Renderer
from data_prep.prepare.render_chunk import Chunks
from data_prep.options import LengthOptions
from data_prep.types import Conversation, Message
from tests.tiny import tiny_tokenizer

workers.MANY = 1
talk = [Conversation((Message("user", "hi"), Message("assistant", "the")), f"r:{{i}}") for i in range(4)]
render = Chunks("conversation", Renderer(tiny_tokenizer()), LengthOptions(max_length=64))
parts = list(workers.rendered(render, [talk[:2], talk[2:]], 1))
print("rows", sum(len(part.facts) for part in parts), flush=True)
"""


def test_a_script_without_a_main_guard_neither_hangs_nor_runs_twice(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[3])
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=root), encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["the script runs", "rows 4"]


def test_garbage_is_looked_for_rarely_and_then_as_before() -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    seen = list(rendered(lambda chunk: [gc.get_threshold()], [[1], [2]], 0))
    assert seen == [[RARELY], [RARELY]]
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, frozen)
