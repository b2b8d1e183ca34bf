"""The script of docs/scale.md that runs a recipe on Ray's workers: on a stand-in for Ray, and on Ray where it is."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.docs.pages import blocks, pages
from tests.launching import ROOT, SECONDS
from tests.tiny_chain import read, sft


def script() -> str:
    found = [text for page in pages() for _, text in blocks(page) if text.startswith('"""ray_run.py')]
    assert len(found) == 1
    return found[0]


class Trainer:
    """Does what Ray's TorchTrainer does, with one worker: calls the function."""

    def __init__(self, work: Any, *, train_loop_config: Any, scaling_config: Any) -> None:
        assert vars(scaling_config) == {"num_workers": 2, "use_gpu": False}
        self.work, self.config = work, train_loop_config

    def fit(self) -> None:
        self.work(self.config)


def test_what_a_worker_does_is_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray, train, torch = (ModuleType(name) for name in ("ray", "ray.train", "ray.train.torch"))
    vars(ray)["train"] = train
    vars(train)["ScalingConfig"] = SimpleNamespace
    vars(torch)["TorchTrainer"] = Trainer
    for module in (ray, train, torch):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys, "argv", ["ray_run.py", *sft(tmp_path, "stages.sft.max_steps=1")])
    exec(compile(script(), "ray_run.py", "exec"), {"__name__": "__main__"})
    assert read(tmp_path / "n" / "run.json")["status"] == "done"


@pytest.mark.grid
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray[train]")
def test_two_workers_of_ray_are_two_processes_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "ray_run.py").write_text(script(), encoding="utf-8")
    # no more is asked for than the test needs, and a slow machine has time to start workers
    plain = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": "/tmp"}
    patient = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(SECONDS), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "ray_run.py"), *sft(tmp_path, "stages.sft.max_steps=2")],
        env={**os.environ, **plain, **patient, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "world_rank=1" in done.stdout + done.stderr
    assert read(tmp_path / "n" / "run.json")["status"] == "done"
