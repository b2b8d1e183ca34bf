"""A run folder as a finished run leaves it, with made-up numbers, for tests that read run folders."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

REPLIES = {
    "base": "hello hello the weather the",
    "sft": "I had soup today. How about you?",
    "ppo": "Oh, I love a good soup! What is your favourite kind?",
}
ADAPTER = b'{"peft_type": "LORA"}'
BINS = [
    {"from": 0.5, "to": 0.55, "n": 130, "confidence": 0.523, "accuracy": 0.5154},
    {"from": 0.7, "to": 0.75, "n": 211, "confidence": 0.731, "accuracy": 0.7725},
    {"from": 0.95, "to": 1.0, "n": 171, "confidence": 0.971, "accuracy": 0.9474},
]
QUESTIONS = ("What did you eat today?", "Do you like rain?", "Tell me about your weekend.", "Which book should I read?")


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = content if isinstance(content, list) else None
    text = "".join(json.dumps(row) + "\n" for row in rows) if rows is not None else json.dumps(content)
    path.write_text(text, encoding="utf-8")


def entry(name: str, **more: Any) -> dict[str, Any]:
    """A stage's row in run.json; parents and digest are filled in when its files are written."""
    return {
        "name": name,
        "status": "done",
        "dir": name,
        "adapter": "lora",
        "on_parent": "continue",
        "load": "fp32",
        "skipped": False,
        "seconds": 42.4,
        "peak_rss_bytes": 1_250_000_000,
        "trainable": 82_432,
        "total": 1_420_032,
        "metrics": {},
        "phases": {"data": 1.25, "train": 30.5},
        **more,
    }


def checkpoint(run: Path, stage: dict[str, Any]) -> Path:
    """The record of a stage's checkpoint, as far as the report reads it."""
    record = {
        "format_version": 1,
        "stage": stage["name"],
        "method": "lora",
        "options": {"method": "lora", "rank": 16},
        "on_parent": stage["on_parent"],
        "load": stage["load"],
        "base": {"id": "package:nano", "revision": None, "fingerprint": "0c0ffee0" * 8},
        "parents": [{**parent, "path": "../x"} for parent in stage["parents"]],
        "probe": {"expected": [[0.25, -1.5], [3.0]]},
        "files": {"adapter_config.json": hashlib.sha256(ADAPTER).hexdigest()},
    }
    (run / stage["dir"]).mkdir(parents=True, exist_ok=True)
    (run / stage["dir"] / "adapter_config.json").write_bytes(ADAPTER)
    path = run / stage["dir"] / "checkpoint.json"
    write(path, record)
    return path


def card(run: Path, stage: str, rows: int, dropped: dict[str, int]) -> None:
    kept = rows - sum(dropped.values())
    content = {
        "source": "generator:smalltalk",
        "license": "CC0-1.0",
        "format": "answer_table",
        "rows": {"in": rows, "kept": kept, "dropped": dropped, "truncated": 0},
        "splits": {"train": kept - 200, "eval": 200},
        "tokens": {"total": kept * 23, "mean": 23.0, "longest": 61},
        "supervised_share": 0.48,
    }
    write(run / stage / "data_card.json", content)


def curves(run: Path) -> None:
    """Metrics that look like those of a real run."""
    rng = random.Random(0)
    sft = [
        {"stage": "sft", "step": i, "split": "train", "loss": 1.2 + 2.9 * math.exp(-i / 60) + rng.gauss(0, 0.07)}
        for i in range(1, 401)
    ]
    sft += [
        {"stage": "sft", "step": i, "split": "eval", "loss": 1.27 + 2.8 * math.exp(-i / 60)}
        for i in range(100, 401, 100)
    ]
    write(run / "sft" / "metrics.jsonl", sft)
    judge = []
    for i in range(1, 201):
        gap = 1 - math.exp(-i / 50)
        numbers = {
            "loss": 0.7 - 0.28 * gap + rng.gauss(0, 0.03),
            "accuracy": min(1, 0.5 + 0.29 * gap + rng.gauss(0, 0.04)),
        }
        judge.append({"stage": "reward_model", "step": i, "split": "train", **numbers})
        if i % 50 == 0:
            held = {"loss": 0.71 - 0.25 * gap, "accuracy": 0.5 + 0.27 * gap}
            judge.append({"stage": "reward_model", "step": i, "split": "eval", **held})
    write(run / "reward_model" / "metrics.jsonl", judge)
    ppo = []
    for i in range(1, 41):
        rise = 1 / (1 + math.exp(-(i - 16) / 5))
        numbers = {
            "objective/reward": -0.2 + 1.6 * rise + rng.gauss(0, 0.06),
            "objective/kl_k1": 0.0 if i <= 5 else 6.31 * rise + rng.gauss(0, 0.15) * (i < 40),
            "objective/entropy": 1.9 - 0.8 * rise + rng.gauss(0, 0.03),
            "response/eos_rate": min(1.0, 0.81 + 0.18 * rise + rng.gauss(0, 0.01)),
            "value/explained_var": -4.0 if i == 1 else 0.7 - 1.1 * math.exp(-i / 6) + rng.gauss(0, 0.02),
        }
        ppo.append({"stage": "ppo", "step": i, "split": "train", **numbers})
    ppo[-1]["objective/kl_k1"] = 6.31
    write(run / "ppo" / "metrics.jsonl", ppo)


def evaluation(run: Path, stages: tuple[str, ...] = ("base", "sft", "ppo")) -> None:
    rng = random.Random(1)
    gold = {"base": 0.02, "sft": 0.42, "ppo": 0.81}
    reward = {"base": -1.71, "sft": 0.12, "ppo": 1.44}
    named = {
        name: {
            "n": 256,
            "loss": 1.4,
            "reward": reward[name],
            "gold": {"score": gold[name], "topic": 0.9, "persona": 0.85, "wellformed": 0.97, "n": 256, "se": 0.03},
        }
        for name in stages
    }
    result = {
        "stages": named,
        "win_rate": {"value": 0.832, "low": 0.781, "high": 0.873, "n": 256, "against": "sft", "judge": "gold"},
        "gain": {"gold": 0.39, "se": 0.0306},
        "reward_model": {
            "accuracy": 0.7654,
            "low": 0.731,
            "high": 0.796,
            "ece": 0.0412,
            "length_corr": 0.118,
            "n": 512,
            "calibration": BINS,
        },
    }
    write(run / "evaluate" / "result.json", result)
    rows = []
    for i in range(40):
        replies = {}
        for name in stages:
            good = float(rng.random() < gold[name])
            text = REPLIES[name] if good else f"{REPLIES[name][: 12 + i]}"
            score = reward[name] + rng.gauss(0, 0.4)
            replies[name] = {"text": text, "reward": score, "gold": good, "finished": bool(good) or i % 3 > 0}
        rows.append({"prompt": QUESTIONS[i % 4], "id": f"smalltalk:{i}", "replies": replies})
    write(run / "evaluate" / "samples.jsonl", rows)


def fake_run(folder: Path) -> Path:
    """A finished run of the whole chain."""
    run = folder / "rlhf-1a2b3c4d"
    step0 = {"kl": 1.2e-7, "ratio_dev": 1.4e-6, "reward_parity": 0.0, "grad_roles": ["policy", "value"]}
    memory = {"base_bytes": 5_680_128.0, "bases": 1.0, "beside_bytes": 2_637_824.0, "ratio": 2.6}
    numbers = {"reference_unchanged": True, "value/loss": 0.1}
    stages = [
        entry("sft", metrics={"eval_loss": 1.273, "perplexity": 3.57}, seconds=61.2, on_parent=None),
        entry("reward_model", metrics={"accuracy": 0.7654, "probe_scores": [1.5, -2.0]}),
        entry("ppo", seconds=215.0, metrics={**numbers, "step0": step0, "memory": memory}),
        entry("evaluate", trainable=0, total=0, seconds=9.3),
    ]
    parents = ({}, {"init": 0}, {"init": 0, "reward": 1}, {"init": 2, "reward": 1})
    evaluation(run)
    for stage, below in zip(stages, parents, strict=True):
        stage["parents"] = [{"role": role, "digest": stages[i]["digest"]} for role, i in below.items()]
        own = run / stage["dir"] / "result.json" if stage is stages[3] else checkpoint(run, stage)
        stage["digest"] = hashlib.sha256(own.read_bytes()).hexdigest()
    curves(run)
    card(run, "sft", 4200, {"too_long": 12, "duplicate_prompt": 31})
    card(run, "reward_model", 6100, {"equal_sides": 44})
    card(run, "ppo", 2100, {})
    record = {
        "format_version": 1,
        "name": run.name,
        "status": "done",
        "pipeline": "rlhf",
        "seed": 0,
        "config_digest": "feedbeef" * 8,
        "machine": {"system": "Linux x86_64", "processor": "A Processor", "cores": 8, "memory_bytes": 68_719_476_736},
        "command": [
            "align",
            "run",
            "pipeline=rlhf",
            "model=nano",
            "data=smalltalk",
            "adapter=lora",
            "stages.ppo.updates=40",
        ],
        "versions": {
            "align": "0.1.0",
            "python": "3.11.2",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "peft": "0.21.2",
        },
        "stages": stages,
    }
    write(run / "run.json", record)
    recipe = "stages:\n" + "".join(f"  {stage['name']}: {{lr: 0.001}}\n" for stage in stages)
    (run / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return run
