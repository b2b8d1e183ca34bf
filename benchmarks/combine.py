"""Two tasks learned apart and combined in every way: held-out losses, on nano and generated small talk.

    python benchmarks/combine.py [OUT] [--steps 60] [--rank 16]

Each task is the small talk of 12 topics: one is answered plainly, the other as a pirate would. The adapters are LoRA.
Runs go to OUT (default: runs) and are kept; a second call trains nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from align.config.compose import compose
from align.pipeline import run
from align.weights.combine import combine
from align.weights.options import CombineOptions, How
from data_prep.generators import smalltalk

TASKS = {"plain": slice(0, 12), "pirate": slice(12, 24)}
WAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("linear, weights 1/2", {"how": How.linear}),
    ("linear, weights 1", {"how": How.linear, "weights": [1.0, 1.0]}),
    ("svd, weights 1", {"how": How.svd, "weights": [1.0, 1.0]}),
    ("ties, density 0.5", {"how": How.ties}),
    ("ties, density 0.9", {"how": How.ties, "density": 0.9}),
    ("dare_linear, density 0.5, weights 1", {"how": How.dare_linear, "weights": [1.0, 1.0]}),
    ("dare_linear, density 0.9, weights 1", {"how": How.dare_linear, "weights": [1.0, 1.0], "density": 0.9}),
    ("dare_ties, density 0.9", {"how": How.dare_ties, "density": 0.9}),
)


def rows_of(persona: str, topics: slice) -> list[dict[str, str]]:
    """The generated small talk of some topics, answered by one persona."""
    table = smalltalk.rows()
    chosen = set(list(dict.fromkeys(row["topic"] for row in table))[topics])
    return [
        {"question": row["prompt"], "answer": row[persona], "split": row["split"]}
        for row in table
        if row["topic"] in chosen
    ]


def task(name: str, out: Path, steps: int, rank: int) -> str:
    """Train one task; returns its checkpoint."""
    file = out / f"combine-{name}.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(name, TASKS[name])), encoding="utf-8")
    words = ["pipeline=sft", "adapter=lora", f"adapter.rank={rank}", "data=files", f"data.conversations.path={file}"]
    config = compose([*words, f"stages.sft.max_steps={steps}", f"name=combine-{name}", f"out={out}"])
    run(config)
    return str(out / config.name / "sft")


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", default="runs", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    targets = [task(name, options.out, options.steps, options.rank) for name in TASKS]
    folder = options.out / "combine-result"
    lines = []
    for shown, how in WAYS:
        shutil.rmtree(folder, ignore_errors=True)
        cut = {} if how["how"] is How.linear else {"rank": 2 * options.rank}
        found = combine(targets, CombineOptions(to=str(folder), **cut, **how))
        losses = list(found["losses"].values())
        lines.append(f"| {shown} | {found['rank']} | " + " | ".join(f"{row['combined']:.3f}" for row in losses) + " |")
    shutil.rmtree(folder, ignore_errors=True)
    print("| combination | rank | " + " | ".join(TASKS) + " |")
    print("| --- | --- | --- | --- |")
    for what in ("base", "own"):
        shown = "the base" if what == "base" else "the task's own adapter"
        print(f"| {shown} | | " + " | ".join(f"{row[what]:.3f}" for row in losses) + " |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
