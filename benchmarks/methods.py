"""Every method on one task: runs the sweep `experiment=method_comparison` and writes what it found into the documents.

python -m benchmarks.methods NAME [OVERRIDE ...]

    python -m benchmarks.methods nano
    python -m benchmarks.methods mini model=hf model.path=BASE data=e2e data.root=DATA

The sweep lands in runs/comparison-NAME and goes on there when the command is repeated. The table and the plot between
`<!-- measured: NAME -->` and `<!-- end -->` in docs/adapters.md are replaced, the plot is docs/comparison-NAME.svg, and
what `align recommend` reads of it is in align/planning/measured.json.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import jinja2

import align
from align.cli import dispatch as cli
from align.report.formatting import number, percent, size
from align.report.run_files import read_json
from align.sweeps.comparison import tuned
from align.sweeps.page import charts
from benchmarks.pages import names_in, write_measured
from data_prep.core.errors import unknown

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "adapters.md"
KEPT = ROOT / "align" / "planning" / "measured.json"
REFERENCE = "lora"


def main() -> None:
    """Run the sweep named on the command line and write its part of the page."""
    if len(sys.argv) < 2 or "=" in sys.argv[1]:
        sys.exit(__doc__)
    name, overrides = sys.argv[1], sys.argv[2:]
    if name not in (known := names_in(PAGE)):  # before the sweep, which takes hours
        print(unknown("measured part", name, known), file=sys.stderr)
        sys.exit(2)
    words = ["run", "-m", "experiment=method_comparison", *overrides, "out=runs", f"name=comparison-{name}"]
    cli.main(words)  # a method that diverges at one rate and is measured at another is no failure
    write(name, Path("runs") / f"comparison-{name}")


def write(name: str, folder: Path) -> None:
    """Replace the part of the page that a finished sweep makes."""
    record = read_json(folder / "sweep.json", [])
    drawing = ROOT / "docs" / f"comparison-{name}.svg"
    drawing.write_text(alone(str(charts(record["rows"])[0]["drawing"])), encoding="utf-8")
    command = shlex.join(hidden(word) for word in record["command"])
    picture = f"![Held-out loss of every method at its best learning rate](comparison-{name}.svg)"
    part = f"{table(record['rows'])}\n\n{picture}\n\n`{command}`\n"
    write_measured(PAGE, name, part)
    keep(name, record["rows"])


def keep(name: str, rows: list[dict[str, Any]]) -> None:
    """Put what `align recommend` reads beside what it has of other bases."""
    best = tuned(rows)
    speed = next(row["tokens_per_second"] for row in best if row["varied"]["adapter"] == REFERENCE)
    methods = {
        row["varied"]["adapter"]: {
            "loss": round(row["metrics"]["eval_loss"], 4),
            "saved": size(row["weights_bytes"]),
            "speed": round(row["tokens_per_second"] / speed, 2),
        }
        for row in best
    }
    parameters = next(row["trainable"] for row in best if row["varied"]["adapter"] == "full")
    known = json.loads(KEPT.read_text(encoding="utf-8")) | {name: {"parameters": parameters, "methods": methods}}
    KEPT.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def hidden(word: str) -> str:
    """An override as anybody would give it: folders by a name in capitals."""
    key, _, value = word.partition("=")
    return {"model.path": "model.path=BASE", "data.root": "data.root=DATA"}.get(key, word) if value else word


def table(rows: list[dict[str, Any]]) -> str:
    """Every method at its best learning rate, the lowest held-out loss first; speed also as a share of LoRA's."""
    best = tuned(rows)
    left = {row["varied"]["adapter"] for row in rows} - {row["varied"]["adapter"] for row in best}
    if left:
        sys.exit(f"not measured at any learning rate: {', '.join(sorted(left))}")
    speed = next(row["tokens_per_second"] for row in best if row["varied"]["adapter"] == REFERENCE)
    rates = sorted({row["varied"]["model.lr_scale"] for row in rows})
    head = ["method", "`model.lr_scale`", "held-out loss", "trainable", "share", "saved", "peak memory", "tokens/s"]
    lines = [[*head, "speed / LoRA's"], ["---"] * (len(head) + 1)]
    for row in best:
        rate = row["varied"]["model.lr_scale"]
        at_edge = rate in (rates[0], rates[-1])
        lines.append(
            [
                f"`{row['varied']['adapter']}`",
                f"{rate}{' (at the edge)' if at_edge else ''}",
                f"{row['metrics']['eval_loss']:.4f}",
                number(row["trainable"]),
                percent(row["share"]),
                size(row["weights_bytes"]),
                size(row["peak_rss_bytes"]),
                number(row["tokens_per_second"]),
                f"{row['tokens_per_second'] / speed:.2f}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def alone(drawing: str) -> str:
    """A drawing of a page as a file of its own, with the page's colours."""
    loader = jinja2.FileSystemLoader(Path(align.__file__).parent)
    style = jinja2.Environment(loader=loader).get_template("page_style.css.jinja").render()
    ground = '<rect width="100%" height="100%" style="fill: var(--paper)"/>'
    opening, rest = drawing.split(">", 1)
    return f'{opening} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{ground}{rest}\n'


if __name__ == "__main__":
    main()
