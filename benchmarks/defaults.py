"""PPO's settings side by side on one SFT and one reward model: the table of "How the defaults were found".

python -m benchmarks.defaults SFT REWARD_MODEL [SETTING ...]

    align run name=found seed=0                      # leaves runs/found/sft and runs/found/reward_model
    python -m benchmarks.defaults runs/found/sft runs/found/reward_model

Every setting is a run of PPO and an evaluation of its own, runs/defaults-SETTING, and is not made again when the
command is repeated. Processor seconds are those of this process; wall time says little on a machine with other work.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import align
from benchmarks.names import one_of
from benchmarks.results import show

OUT = Path("runs")
_WARM = "temperature=1"
SETTINGS: dict[str, list[str]] = {
    name: [f"stages.ppo.{word}" for word in words]
    for name, words in {
        "default": [],
        "warmer": [_WARM, "warmup=0.05"],
        "rloo": [_WARM, "advantage=rloo", "lr=5e-4", "updates=60"],
        "gae-large-lr": [_WARM, "lr=1e-3", "value_lr_ratio=1", "kl_coef=0.1", "critic_warmup=3", "updates=50"],
        "rloo-large-lr": [_WARM, "advantage=rloo", "lr=1e-3", "warmup=0.05", "updates=80"],
        "before": [_WARM, "lr=2e-4", "value_lr_ratio=3", "critic_warmup=5", "updates=30"],
    }.items()
}
"""Name -> what is changed of the defaults."""


def row(name: str, sft: str, reward: str) -> list[str]:
    """One setting, run where it has not been, as a row of the table."""
    words = [f"stages.ppo.init={sft}", f"stages.ppo.reward={reward}", f"stages.evaluate.reward={reward}"]
    config = align.compose([*words, *SETTINGS[name], f"out={OUT}", f"name=defaults-{name}"])
    config = replace(config, stages=[spec for spec in config.stages if spec.name in ("ppo", "evaluate")])
    started = time.process_time()
    record: dict[str, Any] = align.run(config)
    kept = OUT / config.name / "processor_seconds.json"
    if not record["stages"][0]["skipped"]:
        kept.write_text(json.dumps(time.process_time() - started), encoding="utf-8")
    ppo = record["stages"][0]["metrics"]
    stages = json.loads((OUT / config.name / "evaluate" / "result.json").read_text(encoding="utf-8"))["stages"]
    before, after = stages["sft"]["gold"], stages["ppo"]["gold"]
    return [
        name,
        " ".join(word.removeprefix("stages.ppo.") for word in SETTINGS[name]),
        f"{after['score']:.3f}",
        f"{after['persona']:.3f}",
        f"{after['topic'] / before['topic']:.3f}",
        f"{after['wellformed']:.3f}",
        f"{ppo['objective/kl_k1']:.2f}",
        f"{json.loads(kept.read_text(encoding='utf-8')):.0f}",
    ]


def main() -> None:
    """Run the settings named on the command line, else all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sft")
    parser.add_argument("reward_model")
    parser.add_argument("settings", nargs="*", type=one_of("setting", SETTINGS), help=", ".join(SETTINGS))
    given = parser.parse_args()
    head = ["setting", "changes", "gold", "persona", "topic of SFT's", "wellformed", "KL", "processor s"]
    show(head, [row(name, given.sft, given.reward_model) for name in given.settings or SETTINGS])


if __name__ == "__main__":
    main()
