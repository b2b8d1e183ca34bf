"""The house in numbers: `python -m tests.house.report` (it runs a tiny chain, half a minute)."""

from __future__ import annotations

from collections import defaultdict
from statistics import median

from tests.house import order
from tests.house.source import ROOT, modules
from tests.house.trips import measured

PATH = ("README.md", "align/pipeline.py", "align/stages/sft.py", "align/adapters/lora.py")
"""What a newcomer reads to have seen the whole."""


def lines_of(name: str) -> int:
    """Lines of a file of the project."""
    return len((ROOT / name).read_text(encoding="utf-8").splitlines())


def main() -> None:
    """Print files and lines by package, sizes, circles, imports that run up, and the length of a newcomer's path."""
    packages: dict[str, list[int]] = defaultdict(list)
    for module in modules():
        if not module.name.startswith(("tests", "benchmarks")):
            packages[order.package_of(module.name)].append(len(module.path.read_text(encoding="utf-8").splitlines()))
    for name, sizes in packages.items():
        print(f"{name:<24}{len(sizes):>4} files {sum(sizes):>6} lines")
    every = [size for sizes in packages.values() for size in sizes]
    print(f"{'all':<24}{len(every):>4} files {sum(every):>6} lines, median {median(every):g}, most {max(every)}")
    imports = order.all_imports()
    print(f"circles {len(order.circles(imports))}, imports that run up {len(order.imports_up(imports))}")
    path = {name: lines_of(name) for name in PATH}
    frames, files = measured()
    for loop, chain in frames.items():
        print(f"from {loop} to the model {len(chain)} frames: {', '.join(chain)}")
    print(f"a training row goes through {len(files)} files: {', '.join(f'{n} ({form})' for n, form in files.items())}")
    print(f"a newcomer reads {sum(path.values())} lines: {', '.join(f'{name} {size}' for name, size in path.items())}")


if __name__ == "__main__":
    main()
