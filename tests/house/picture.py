"""The picture of docs/architecture.md, made from the imports: `python -m tests.house.picture` draws it anew.

A square for every pair of packages where the row's needs the column's. Packages stand in the order of
`tests/house/order.py`, from the top down, so that an import which runs up would stand left of the diagonal, where
nothing may be. The bars at the right are lines of code, to the nearest hundred.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.house.order import ORDER, all_imports, package_of
from tests.house.source import ROOT, modules

PLACE = ROOT / "docs" / "architecture.svg"
CELL, LEFT, TOP, BAR = 19, 168, 118, 110
STYLE = """
    text { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #24292f; }
    .few { fill: #6e7781; } .line { stroke: #d0d7de; } .self { fill: #eaeef2; }
    .need { fill: #0b6e99; } .size { fill: #9aa7b1; }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3; } .few { fill: #8d96a0; } .line { stroke: #30363d; } .self { fill: #21262d; }
      .need { fill: #58b6e0; } .size { fill: #57606a; }
    }"""


def packages() -> list[str]:
    """The packages that hold files, from the top down; those of `reward` as one."""
    held = {package_of(module.name) for module in modules() if not module.name.startswith(("tests", "benchmarks"))}
    names = [_shown(entry) for line in ORDER for entry in line if entry in held]
    return list(dict.fromkeys(names))


def _shown(package: str) -> str:
    """The name of a row: files that stand alone in `reward` are one."""
    return "reward" if package.startswith("reward") else package


def needs() -> set[tuple[str, str]]:
    """Pairs of packages of which the first imports the second."""
    pairs = {
        (_shown(package_of(each.importer)), _shown(package_of(each.imported)))
        for each in all_imports()
        if not each.importer.startswith(("tests", "benchmarks"))
    }
    return {(importer, imported) for importer, imported in pairs if importer != imported}


def sizes() -> Counter[str]:
    """Lines of every package."""
    found: Counter[str] = Counter()
    for module in modules():
        if not module.name.startswith(("tests", "benchmarks")):
            found[_shown(package_of(module.name))] += len(module.path.read_text(encoding="utf-8").splitlines())
    return found


def picture() -> str:
    """The SVG: names and sizes at the left, names above, and a square where one package needs another."""
    names, needed, measured = packages(), needs(), sizes()
    width, height = LEFT + CELL * len(names) + BAR + 24, TOP + CELL * len(names) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        "  <title>Which package needs which: every square lies right of the diagonal</title>",
        f"  <style>{STYLE}\n  </style>",
    ]
    most = max(measured.values())
    for row, name in enumerate(names):
        y = TOP + CELL * row
        x = LEFT + CELL * row
        parts.append(f'  <line class="line" x1="0" x2="{width}" y1="{y}" y2="{y}"/>')
        parts.append(f'  <text x="0" y="{y + 14}">{name}</text>')
        parts.append(f'  <text class="few" transform="translate({x + 14} {TOP - 6}) rotate(-60)">{_short(name)}</text>')
        parts.append(f'  <rect class="self" x="{x}" y="{y}" width="{CELL}" height="{CELL}"/>')
        for column, other in enumerate(names):
            if (name, other) in needed:
                parts.append(
                    f'  <rect class="need" x="{LEFT + CELL * column + 3}" y="{y + 3}" width="{CELL - 6}" '
                    f'height="{CELL - 6}" rx="3"><title>{name} needs {other}</title></rect>'
                )
        parts.append(_size(LEFT + CELL * len(names) + 12, y, measured[name], most))
    return "\n".join([*parts, "</svg>", ""])


def _short(name: str) -> str:
    """A column's name: the last word of the package."""
    return name.rpartition(".")[2]


def _size(x: int, y: int, lines: int, most: int) -> str:
    """The bar that shows how many lines a package has."""
    about = max(100, round(lines, -2))
    bar = f'<rect class="size" x="{x}" y="{y + 5}" width="{BAR * about / most:.0f}" height="{CELL - 10}" rx="2">'
    return f"  {bar}<title>about {about:,} lines</title></rect>"


def main(place: Path = PLACE) -> None:
    """Write the picture."""
    place.write_text(picture(), encoding="utf-8")
    print(f"wrote {place.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
