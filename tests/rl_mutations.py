"""The details of docs/ppo.md, each turned wrong once before its tests: `python -m tests.rl_mutations [DETAIL ...]`.

A mutation of `tests/rl_details.py` replaces a piece of a file in a copy of the tree and runs the tests that guard it
there; they must fail, and pass before anything is replaced. A forked child runs each lot of tests, so that the
libraries are imported once.
"""

from __future__ import annotations

import compileall
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.rl_details import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("align", "reward", "data_prep", "recipes", "tests")
GREEN, RED, ELSEWHERE = 0, 1, 99
"""Exit codes: pytest's own two, and of a child whose tests did not see the copy."""


def places(mutation: Mutation, root: Path = ROOT) -> int:
    """How often what a mutation replaces stands in its file."""
    return (root / mutation.file).read_text(encoding="utf-8").count(mutation.right)


def copied(to: Path) -> Path:
    """A copy of the tree that tests run in, compiled."""
    for room in ROOMS:
        shutil.copytree(ROOT / room, to / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "pyproject.toml", to)
    compileall.compile_dir(to, quiet=2)
    return to


def run(tree: Path, guards: Sequence[str]) -> tuple[int, str]:
    """(exit code, what pytest said) of tests in a copy of the tree, in a child of this process."""
    said = tree / "said.txt"
    child = os.fork()
    if not child:
        code = ELSEWHERE
        with said.open("w") as stream, contextlib.suppress(BaseException):
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            code = _within(tree, guards)
            sys.stdout.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, said.read_text(encoding="utf-8", errors="replace")


def _within(tree: Path, guards: Sequence[str]) -> int:
    """pytest's exit code, of tests that import the tree's own packages; to be called in a child."""
    import pytest

    os.chdir(tree)
    tempfile.tempdir = str(tree)  # what tests make is removed with the tree
    sys.dont_write_bytecode = True
    sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    for name in [name for name in sys.modules if name.partition(".")[0] in ROOMS]:
        del sys.modules[name]
    code = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *guards]))
    seen = sys.modules.get("align") or sys.modules.get("reward")
    return code if seen is not None and tree in Path(str(seen.__file__)).parents else ELSEWHERE


def tried(tree: Path, mutation: Mutation) -> tuple[int, str]:
    """What the guards of a mutation say once it is there; the tree is left as it was."""
    path = tree / mutation.file
    kept = tree / "kept.py"
    shutil.copy2(path, kept)
    path.write_text(kept.read_text(encoding="utf-8").replace(mutation.right, mutation.wrong), encoding="utf-8")
    try:
        return run(tree, mutation.guards)
    finally:
        shutil.move(kept, path)


def main(words: Sequence[str]) -> int:
    """Try the mutations of these details, or all; the exit code is 1 if a guard missed one."""
    import accelerate  # noqa: F401, imported before the first fork
    import hydra  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    chosen = [each for each in MUTATIONS if not words or str(each.detail) in words]
    missed = 0
    with tempfile.TemporaryDirectory(prefix="align-mutations-") as folder:
        tree = copied(Path(folder).resolve())
        guards = sorted({guard for each in chosen for guard in each.guards})
        code, said = run(tree, guards)
        if code != GREEN:
            print(f"{said}\nthe guards fail before anything is changed (exit code {code})")
            return 1
        print(f"{len(guards)} guards pass; {len(chosen)} mutations", flush=True)
        for each in chosen:
            code, said = tried(tree, each)
            missed += code != RED
            print(f"{'red' if code == RED else 'MISSED'} {each.detail:>2} {each.what} ({each.file})", flush=True)
            if code not in (RED, GREEN):
                print(said, flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} mutations were seen, of {len({m.detail for m in chosen})} details")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
