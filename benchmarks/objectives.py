"""What each objective makes of one SFT: PPO with each estimator, DPO, KTO, ORPO, and the best of 16 replies of SFT.

    python benchmarks/objectives.py RUN [RUN ...] [--out runs] [--only rloo,dpo] [OVERRIDES]

RUN is a finished run of the whole chain, such as the quickstart; its SFT, reward model and seed are taken, and ORPO
begins at the base in the place of SFT. Each objective is a run of its own beside RUN, which the same command skips
once it is there. Of several RUNs, which differ in their seeds, the table has the median of each number, and the lowest
and highest gold. Of OVERRIDES a run leaves out the options of stages that it has not.

Gold and topic are those of greedy replies to the held-out prompts; KL is that of replies drawn at `TEMPERATURE` to as
many of them as `PROMPTS`, in nats per reply, from SFT (of the best of n: log n - (n - 1) / n). Replies are those that
were sampled to get there, seconds and peak memory those of the stage itself.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from loop import gold_parts
from names import some_of
from results import show

from align.inference.generation import Reply, RolloutEngine, Sampling
from align.inference.loaded import Opened
from align.inference.scoring import pack_responses, score_replies
from align.roles import chosen_logprobs
from align.tracking.metrics import read_metrics
from data_prep.types import Message

PPO = ["pipeline=ppo", "stages.ppo.init={sft}", "stages.ppo.reward={reward_model}"]
OBJECTIVES = {
    "gae": [*PPO, "stages.ppo.advantage=gae"],
    "rloo": [*PPO, "stages.ppo.advantage=rloo"],
    "grpo": [*PPO, "stages.ppo.advantage=grpo"],
    "reinforce_pp": [*PPO, "stages.ppo.advantage=reinforce_pp"],
    "dpo": ["pipeline=dpo", "stages.dpo.init={sft}"],
    "dpo_plain": ["pipeline=dpo", "stages.dpo.init={sft}", "stages.dpo.sft_weight=0"],
    "kto": ["pipeline=kto", "stages.kto.init={sft}"],
    "kto_plain": ["pipeline=kto", "stages.kto.init={sft}", "stages.kto.sft_weight=0"],
    "orpo": ["pipeline=orpo"],
}
"""Objective -> the words of its run."""
NUMBERS = {
    "gold": ".3f",
    "topic": ".3f",
    "KL": ".2f",
    "replies": ",.0f",
    "seconds": ".0f",
    "peak-MiB": ".0f",
    "trained": ",.0f",
}
"""What is told of an objective, and how it is written."""
DRAWN, PROMPTS, TEMPERATURE, LONGEST = 16, 128, 0.7, 64
"""Replies of which the best is taken; prompts of the KL; how replies are drawn, and their most tokens."""


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+")
    parser.add_argument("--out", default="runs")
    names = [*OBJECTIVES, "best"]
    parser.add_argument("--only", type=some_of("objective", names), default=names)
    given, words = parser.parse_known_args()
    folders = [Path(given.out) / word for word in given.run if "=" not in word]
    words += [word for word in given.run if "=" in word]
    for folder in folders:
        if not (folder / "evaluate" / "samples.jsonl").is_file():
            parser.error(f"{folder} is no finished run of the whole chain, which ends with an evaluation")
    show(["objective", *NUMBERS], table([measured(folder, given.only, words) for folder in folders]))


def table(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> list[list[str]]:
    """A row for each objective: the medians of its numbers over runs, and how far gold goes."""
    rows = []
    for name in runs[0]:
        found = [run[name] for run in runs]
        cells = [
            format(median(one[number] for one in found), form) if number in found[0] else "-"
            for number, form in NUMBERS.items()
        ]
        if len(runs) > 1:
            cells[0] += f" ({min(one['gold'] for one in found):.3f} to {max(one['gold'] for one in found):.3f})"
        rows.append([name, *cells])
    return rows


def measured(folder: Path, objectives: Sequence[str], words: Sequence[str]) -> dict[str, dict[str, float]]:
    """What each objective makes of a run's SFT, by the names of `NUMBERS`; the first is SFT itself."""
    out, words = folder.parent, [*words, f"seed={read(folder / 'run.json')['seed']}"]
    below = {name: str((folder / name).resolve()) for name in ("sft", "reward_model")}
    asked, parent = questions(folder), Opened.target(below["sft"], str(out))
    found = {"sft": gold_of(folder, "sft") | {"KL": 0.0}}
    for name in objectives:
        if name == "best":
            found[f"best of {DRAWN}"] = best_of(parent, below["reward_model"], asked, of_stage("evaluate", words))
            continue
        own, pipeline = f"{folder.name}-{name}", OBJECTIVES[name][0].removeprefix("pipeline=")
        given = [*(word.format(**below) for word in OBJECTIVES[name]), *of_stage(pipeline, words)]
        align("run", *given, f"out={out}", f"name={own}")
        entry = read(out / own / "run.json")["stages"][0]
        target = (out / own / entry["dir"]).resolve()
        given = ["pipeline=evaluate", f"stages.evaluate.init={target}", *of_stage("evaluate", words)]
        align("run", *given, f"out={out}", f"name={own}-eval")
        found[name] = {
            **gold_of(out / f"{own}-eval", entry["name"]),
            "KL": distance(Opened.target(str(target), str(out)), parent, asked),
            "replies": sampled(target),
            "seconds": entry["seconds"],
            "peak-MiB": entry["peak_rss_bytes"] / 2**20,
            "trained": entry["trainable"],
        }
    return found


def of_stage(name: str, words: Sequence[str]) -> list[str]:
    """The words of a run whose only stage is `name`: those of other stages are left out."""
    return [word for word in words if not word.startswith("stages.") or word.startswith(f"stages.{name}.")]


def sampled(stage: Path) -> float:
    """Replies that a finished stage has sampled to learn from: those of its updates, where it is PPO."""
    recipe = yaml.safe_load((stage / "recipe.yaml").read_text(encoding="utf-8"))
    updates = [row for row in read_metrics(stage / "metrics.jsonl") if row["split"] == "train"]
    return float(len(updates) * recipe["batch_size"]) if "updates" in recipe else 0.0


def align(*words: str) -> None:
    """One command in a process of its own, so that its peak memory is its own too."""
    subprocess.run([sys.executable, "-m", "align.cli", *words], check=True)


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def gold_of(folder: Path, name: str) -> dict[str, float]:
    """A policy's gold score in a run's evaluation, and the part of it that is on the topic."""
    found = read(folder / "evaluate" / "result.json")["stages"][name]["gold"]
    return {"gold": found["score"], "topic": found["topic"]}


def questions(folder: Path) -> list[list[dict[str, str]]]:
    """The held-out prompts of a run, as messages."""
    with (folder / "evaluate" / "samples.jsonl").open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    return [[*row.get("before", []), {"role": "user", "content": row["prompt"]}] for row in rows]


def drawn(opened: Opened, asked: list[list[dict[str, str]]], times: int = 1) -> list[tuple[list[int], Reply]]:
    """(prompt, reply) of a policy, `times` replies to each prompt, one after another."""
    messages = [[Message(one["role"], one["content"]) for one in each] for each in asked for _ in range(times)]
    ids = [opened.renderer.prompt(each) for each in messages]
    engine = RolloutEngine(opened.role, opened.renderer.end_token_id)
    generator, found = torch.Generator().manual_seed(0), []
    for start in range(0, len(ids), 256):
        found += engine.generate(ids[start : start + 256], Sampling(LONGEST, TEMPERATURE), generator)
    return list(zip(ids, found, strict=True))


@torch.no_grad()
def distance(policy: Opened, parent: Opened, asked: list[list[dict[str, str]]]) -> float:
    """KL of a policy from its parent in nats per reply, by the policy's own draws."""
    total = 0.0
    for prompt, reply in drawn(policy, asked[:PROMPTS]):
        batch = pack_responses([(prompt, reply.ids)])
        hidden_MD = parent.role.hidden(batch.packed)[batch.source_M]
        total += sum(reply.logprobs) - float(
            chosen_logprobs(parent.role, hidden_MD, batch.targets_M, TEMPERATURE).sum()
        )
    return total / min(PROMPTS, len(asked))


def best_of(
    policy: Opened, reward_model: str, asked: list[list[dict[str, str]]], words: Sequence[str]
) -> dict[str, float]:
    """The reply that the reward model prefers, of several of the policy's to each prompt; `words` choose the data."""
    started = time.perf_counter()
    judge, parts_of = Opened.target(reward_model, ""), gold_parts(words)
    pairs = drawn(policy, asked, DRAWN)
    scores = score_replies(judge.role, [(prompt, reply.ids) for prompt, reply in pairs], 64)
    found = []
    for place, messages in enumerate(asked):
        best = max(range(place * DRAWN, (place + 1) * DRAWN), key=scores.__getitem__)
        reply = pairs[best][1]
        found.append(parts_of(messages[-1]["content"], policy.renderer.decode(reply.ids), reply.finished))
    return {
        "gold": sum(parts["score"] for parts in found) / len(found),
        "topic": sum(parts["topic"] for parts in found) / len(found),
        "KL": math.log(DRAWN) - (DRAWN - 1) / DRAWN,
        "replies": float(len(pairs)),
        "seconds": time.perf_counter() - started,
    }


if __name__ == "__main__":
    main()
