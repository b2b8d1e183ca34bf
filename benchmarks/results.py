"""The rows of docs/results.md, read from run folders, and their mean: nothing in that page is typed by hand.

python benchmarks/results.py RUN_FOLDER [RUN_FOLDER ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def row(folder: Path) -> list[str]:
    """One run: topic and gold of SFT and PPO, gain with its paired error, KL, reward model, time, memory."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    stages = {entry["name"]: entry for entry in run["stages"]}
    result = json.loads((folder / stages["evaluate"]["dir"] / "result.json").read_text(encoding="utf-8"))
    sft, ppo = (result["stages"][name]["gold"] for name in ("sft", "ppo"))
    gain = result["gain"]
    chain = " / ".join(str(stages[name]["adapter"]) for name in ("sft", "reward_model", "ppo"))
    modes = ", ".join(str(stages[name]["on_parent"]) for name in ("reward_model", "ppo"))
    seconds = sum(entry["seconds"] for entry in stages.values())
    peak = max(entry["peak_rss_bytes"] for entry in stages.values()) / 2**20
    return [
        folder.name,
        str(run["seed"]),
        chain,
        modes,
        f"{sft['topic']:.3f}",
        f"{ppo['topic']:.3f}",
        f"{ppo['topic'] / sft['topic']:.3f}" if sft["topic"] else "-",
        f"{sft['score']:.3f}",
        f"{ppo['score']:.3f}",
        f"{gain['gold']:+.3f}",
        f"{gain['se']:.3f}",
        f"{gain['gold'] / gain['se']:.1f}" if gain["se"] else "-",
        f"{stages['ppo']['metrics']['objective/kl_k1']:.2f}",
        f"{result['reward_model']['accuracy']:.3f}",
        f"{seconds:.0f}",
        f"{peak:.0f}",
    ]


def mean_row(rows: list[list[str]]) -> list[str]:
    """The mean of every column of numbers."""
    return ["mean", "-", *(mean(column) for column in list(zip(*rows, strict=True))[2:])]


def mean(column: tuple[str, ...]) -> str:
    """The mean of printed numbers, printed as they are; "-" where one is not a number."""
    try:
        numbers = [float(cell) for cell in column]
    except ValueError:
        return "-"
    places, sign = len(column[0].partition(".")[2]), "+" if column[0][0] in "+-" else ""
    return f"{sum(numbers) / len(numbers):{sign}.{places}f}"


def memory_row(folder: Path) -> list[str]:
    """What PPO holds in memory, counted by storage."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    held: dict[str, Any] = next(e for e in run["stages"] if e["name"] == "ppo")["metrics"]["memory"]
    names = ("base_bytes", "beside_bytes", "sft_bytes", "head_bytes")
    return [folder.name, f"{held['bases']:.0f}", *(f"{held[name]:,.0f}" for name in names), f"{held['ratio']:.3f}"]


def show(head: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    for line in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(line) + " |")
    print()


def main() -> None:
    """Print both tables for the run folders on the command line."""
    folders = [Path(word) for word in sys.argv[1:]]
    if not folders:
        sys.exit(__doc__)
    head = "run seed methods modes SFT-topic PPO-topic ratio SFT-gold PPO-gold gain SE gain/SE KL RM-accuracy"
    rows = [row(folder) for folder in folders]
    show([*head.split(), "seconds", "peak-MiB"], rows if len(rows) == 1 else [*rows, mean_row(rows)])
    show(
        ["run", "bases", "base-bytes", "beside", "SFT's", "heads", "ratio"], [memory_row(folder) for folder in folders]
    )


if __name__ == "__main__":
    main()
