"""The tests that compare numbers, as other processors would compute them: `python -m tests.processors`.

Which kernels run, and in which order they add up, is chosen by the processor: `ATEN_CPU_CAPABILITY` (torch's own),
`MKL_CBWR` and `ONEDNN_MAX_CPU_ISA` (the libraries under it) and the number of threads choose it here. Each two values
of two of them come together in one of the settings below; the machine's own choice is left where a value is missing.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VALUES = {
    "ATEN_CPU_CAPABILITY": ("default", "avx2", None),
    "MKL_CBWR": ("COMPATIBLE", None),
    "ONEDNN_MAX_CPU_ISA": ("AVX2", None),
    "OMP_NUM_THREADS": ("1", "2"),
}
SETTINGS = (
    ("default", "COMPATIBLE", "AVX2", "1"),
    ("default", None, None, "2"),
    ("avx2", "COMPATIBLE", None, "2"),
    ("avx2", None, "AVX2", "1"),
    (None, "COMPATIBLE", "AVX2", "2"),
    (None, None, None, "1"),
)
"""Values of VALUES in their order: a pairwise cover."""
TURNS = (0, 1, 1, 0, 0, 1)
"""Which half of the tests a setting takes: each test runs once under each ATEN_CPU_CAPABILITY."""
COMPUTES = {"torch", "tests.tiny_chain", "tests.tiny_training", "tests.architectures"}
"""A file that imports one of these computes."""
DELICATE = {"assert_close", "allclose", "approx"}
"""One that also names one of these compares numbers that another order of summation changes;"""
BITS = {"equal", "read_bytes", "logits"}
"""one of these, bits that must be the same on each processor."""
RUNS = {"made", "finished", "execute", "run", "main", "Popen"}
"""Names of what runs whole stages or other programs; without one of them a file is quick."""


def computing_files(quick: bool = False) -> list[Path]:
    """The test files that compute with torch and compare what they get.

    Args:
        quick: only those that compare numbers within a tolerance, and run no whole stages.
    """
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        imported, named = _names(path)
        wanted = named & DELICATE and not named & RUNS if quick else named & (DELICATE | BITS)
        if imported & COMPUTES and wanted:
            found.append(path)
    return found


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """As a plug-in of pytest: every `step`-th test from `first`, as the variable TURN says ("first/step")."""
    first, step = map(int, os.environ["TURN"].split("/"))
    config.hook.pytest_deselected(items=[item for place, item in enumerate(items) if place % step != first])
    items[:] = items[first::step]


def _names(path: Path) -> tuple[set[str], set[str]]:
    """What a file imports, and the names it takes from there or asks objects for."""
    imported, named = set[str](), set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported.update(item.name for item in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
            named.update(item.name for item in node.names)
        elif isinstance(node, ast.Attribute):
            named.add(node.attr)
    return imported, named


def environment(setting: tuple[str | None, ...], more: dict[str, str]) -> dict[str, str]:
    """This process's environment with a setting in place of its own, and `more`."""
    given = {name: value for name, value in zip(VALUES, setting, strict=True) if value is not None}
    kept = {name: value for name, value in os.environ.items() if name not in VALUES and not name.startswith("PYTEST_")}
    return {**kept, **given, **more, "HF_HUB_OFFLINE": "1"}


def run(setting: tuple[str | None, ...], words: list[str], more: dict[str, str]) -> tuple[int, str]:
    """(exit code, what pytest said) of tests under a setting."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(setting, more), capture_output=True, text=True, check=False
    )
    return done.returncode, (done.stdout + done.stderr).rstrip()


def main() -> int:
    """Run the files under every setting; the exit code is 1 if any test failed under any."""
    files = [str(path.relative_to(ROOT)) for path in computing_files()]
    print(f"{len(files)} files under {len(SETTINGS)} settings", flush=True)
    codes = []
    for setting, half in zip(SETTINGS, TURNS, strict=True):
        workers = max(1, (os.cpu_count() or 1) // int(setting[-1] or 1))
        words = ["-p", "tests.processors", "-n", str(workers), "--dist", "loadfile", *(sys.argv[1:] or ["-q"]), *files]
        code, said = run(setting, words, {"TURN": f"{half}/2"})
        codes.append(code)
        shown = " ".join(f"{name}={value or '-'}" for name, value in zip(VALUES, setting, strict=True))
        lines = said.splitlines()
        if code:
            print("\n".join(line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))), flush=True)
        print(f"{shown}: {lines[-1] if lines else f'exit code {code}'}", flush=True)
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
