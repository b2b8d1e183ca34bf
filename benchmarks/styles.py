"""In which style each stage answers: the shares of its replies that are known answers of a style.

    python benchmarks/styles.py RUN_FOLDER [OUT]

Reads the evaluation's samples and the answer table of the run's own recipe. A reply that several styles share counts
for each of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

from data_prep.core.options import build
from data_prep.options import DataOptions
from data_prep.prepare.prepare import source_rows


def main() -> None:
    """Print one row per stage."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    data = build(DataOptions, recipe["stages"]["evaluate"]["data"], "data")
    styles = list(data.gold.options["styles"])
    known: dict[str, set[str]] = {style: set() for style in styles}
    for row in source_rows(data, data.gold.source):
        for style in styles:
            known[style].add(" ".join(str(row.get(style) or "").split()))
    samples = [json.loads(line) for line in (folder / "evaluate" / "samples.jsonl").open(encoding="utf-8")]
    print("| stage | " + " | ".join(styles) + " |")
    print("| --- " * (len(styles) + 1) + "|")
    for stage in samples[0]["replies"]:
        texts = [" ".join(sample["replies"][stage]["text"].split()) for sample in samples]
        shares = [sum(text in known[style] for text in texts) / len(texts) for style in styles]
        print(f"| {stage} | " + " | ".join(f"{share:.3f}" for share in shares) + " |")


if __name__ == "__main__":
    main()
