"""Programs started by torchrun or another launcher, as two processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

SECONDS = 600
"""A limit that only catches a hang."""
ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = ("torch.distributed.run", "--nproc_per_node", "2")
ACCELERATE = (
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--dynamo_backend",
    "no",
)


def launched(*words: str, by: Sequence[str] = TORCHRUN, code: int = 0, **environment: str) -> str:
    """What two processes of a program say, whose launcher ends with `code`; all of them are ended on a hang."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    module, *options = by
    plain = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    process = subprocess.Popen(
        [sys.executable, "-m", module, *options, "--main_process_port" if "accelerate" in module else "--master_port",
         str(port), *words],
        env={**plain, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate()
        pytest.fail(f"two processes hang; they had said:\n{output[-1500:]}")
    errors = [line for line in output.splitlines() if "Error" in line]
    assert process.returncode == code, "\n".join(errors[:10]) + output[-1500:]
    return output
