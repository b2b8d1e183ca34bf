"""The peak memory of stages against `align plan`: really trained, each run in a process of its own.

    OMP_NUM_THREADS=1 python benchmarks/memory.py [--cell NAME] [--document]

What a stage adds above the bare process is compared, at least 300 MB of it; a cell is a size, a method, lengths and
settings, and its chain is trained for two steps a stage on fresh weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from pages import write_measured

from align.planning.memory.parts import PROCESS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "plan.md"
LEAST = 300_000_000
"""Bytes that a stage must add to be compared."""


def shape(width: int, layers: int) -> list[str]:
    """A fresh Llama of this width and depth."""
    fields = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    fields |= {"num_attention_heads": width // 64, "num_key_value_heads": width // 64, "head_dim": 64}
    return ["model=nano_blank", *(f"model.config.{name}={value}" for name, value in fields.items())]


SHORT = ["stages.sft.max_steps=2", "stages.reward_model.max_steps=2", "stages.evaluate.prompts=64"]
PPO = ["stages.ppo.updates=2", "stages.ppo.critic_warmup=0", "stages.ppo.ppo_epochs=1", "stages.ppo.monitor=off"]
SFT = ["pipeline=sft", "stages.sft.max_steps=2"]
CELLS = {
    "lora 512x8, chain": [*shape(512, 8), *SHORT, *PPO],
    "full 768x6, sft": [*shape(768, 6), *SFT, "adapter=full"],
    "lora 768x8, sft, 96 rows, checkpointing": [
        *(*shape(768, 8), *SFT),
        *("stages.sft.batch_size=96", "stages.sft.gradient_checkpointing=true"),
    ],
    "vera 512x8, sft, 64 rows": [*shape(512, 8), *SFT, "adapter=vera", "stages.sft.batch_size=64"],
    "qlora 1024x8, sft": [*shape(1024, 8), *SFT, "adapter=qlora"],
    "prefix 512x8, dpo": [*shape(512, 8), "pipeline=dpo", "adapter=prefix", "stages.dpo.max_steps=2"],
}


def align(*words: str) -> str:
    """The output of an `align` command."""
    done = subprocess.run([sys.executable, "-m", "align.cli", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"align {' '.join(words)}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def measured(name: str, overrides: list[str]) -> list[list[str]]:
    """A row for every stage of a cell that adds enough."""
    planned = json.loads(align("plan", *overrides, "device=cpu", "--json"))["stages"]
    with tempfile.TemporaryDirectory() as out:
        record = json.loads(align("run", *overrides, f"out={out}", "--json"))
    rows = []
    for entry in record["stages"]:
        plan = planned[entry["name"]]["peak_bytes"] - PROCESS["cpu"]
        real = entry["peak_rss_bytes"] - PROCESS["cpu"]
        print(name, entry["name"], plan, real, planned[entry["name"]]["parts"], flush=True)
        if min(plan, real) >= LEAST:
            ratio = f"{plan / real:.2f}"
            rows.append([name, entry["name"], f"{plan / 1e6:.0f} MB", f"{real / 1e6:.0f} MB", ratio])
    return rows


def main() -> None:
    """All cells, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", choices=list(CELLS))
    parser.add_argument("--document", action="store_true", help="write the table into docs/plan.md")
    options = parser.parse_args()
    chosen = {name: words for name, words in CELLS.items() if options.cell in (None, name)}
    rows = [row for name, words in chosen.items() for row in measured(name, words)]
    head = ["cell", "stage", "planned", "measured", "planned / measured"]
    lines = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]
    print("\n".join(lines))
    if options.document:
        command = "Above the bare process, by `python benchmarks/memory.py --document` on a CPU."
        write_measured(PAGE, "memory", "\n".join([*lines, "", command]) + "\n")


if __name__ == "__main__":
    main()
