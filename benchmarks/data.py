"""Preparing conversations for training, side by side with TRL: rows a second, and memory on a file ten times as large.

python benchmarks/data.py [--rows 100000] [--rounds 3] [--tokenizer FOLDER]
python benchmarks/data.py --memory 10

Both begin at the same JSONL file with nothing cached, and end with rows of ids that are masked to the assistant's words
and packed into 4,096 tokens. TRL's way is `load_dataset` and `SFTTrainer(...)`, which prepares its data set in two
processes when it is constructed; both parts are timed apart. Ours reads, checks, splits and digests the rows too. Ways
alternate, each in a process of its own; imports are not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parents[1]
LENGTH = 4096


def conversations(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Conversations of one to three turns, made of 20,000 invented words with the frequencies of natural ones."""
    draw = random.Random(seed)
    starts = ["b", "c", "d", "f", "g", "l", "m", "n", "p", "r", "s", "t", "v", "th", "st", "pr"]
    ends = ["a", "e", "i", "o", "u", "ai", "ea", "er", "an", "in", "on", "es"]
    made = ("".join(draw.choice(starts) + draw.choice(ends) for _ in range(draw.randint(1, 4))) for _ in range(40_000))
    vocabulary = list(dict.fromkeys(made))[:20_000]
    weights = list(accumulate(1 / (place + 3) for place in range(len(vocabulary))))

    def said(mean: float) -> str:
        words = draw.choices(vocabulary, cum_weights=weights, k=max(2, min(200, round(draw.lognormvariate(mean, 0.6)))))
        return " ".join(words).capitalize() + draw.choice(".?!")

    for number in range(count):
        messages = [{"role": "system", "content": "You answer in few words."}] if draw.random() < 0.3 else []
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            messages += [{"role": "user", "content": said(2.5)}, {"role": "assistant", "content": said(3.0)}]
        messages[-2]["content"] += f" {number}"  # no question twice
        yield {"messages": messages}


def write(path: Path, count: int) -> Path:
    """A JSONL file of so many conversations."""
    with path.open("w", encoding="utf-8") as file:
        for row in conversations(count):
            file.write(json.dumps(row) + "\n")
    return path


# ---------------------------------------------------------------------- the ways, each in a process of its own
def ours(path: str, tokenizer: str, workers: int) -> dict[str, float]:
    """This package's preparation, and the cut of an epoch into packed forward passes."""
    from transformers import AutoTokenizer

    from align.stages.base import TrainingStage
    from align.training.batching import Windows
    from data_prep.options import DataOptions, LengthOptions, SourceOptions
    from data_prep.prepare.arrow_rows import lengths_of
    from data_prep.prepare.prepare import Renderer, prepare
    from data_prep.types import RowKind

    renderer = Renderer(AutoTokenizer.from_pretrained(tokenizer))
    data = DataOptions(conversations=SourceOptions(path=path), workers=workers)
    started, before = time.perf_counter(), cpu_seconds()
    prepared = prepare(RowKind.conversations, data, renderer, LengthOptions(LENGTH), 0)
    windows = Windows(lengths_of(prepared.train), TrainingStage(batch_size=512, micro_tokens=LENGTH), 0)
    packs = sum(len(window.passes[0]) for window in windows.epoch(0))
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - before
    card = prepared.card
    return {
        "seconds": seconds,
        "cpu": cpu,
        "tokens": card["tokens"]["total"],
        "supervised": card["tokens"]["supervised"],
        "packs": packs,
    }


def trl(path: str, tokenizer: str, workers: int) -> dict[str, float]:
    """TRL's preparation: the data set is read, and prepared when the trainer is constructed."""
    import logging

    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    logging.disable(logging.WARNING)
    words = AutoTokenizer.from_pretrained(tokenizer)
    small: Any = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **small))
    options = SFTConfig(
        output_dir=str(Path(os.environ["HF_DATASETS_CACHE"]) / "out"),
        assistant_only_loss=True,
        packing=True,
        max_length=LENGTH,
        dataset_num_proc=workers,
        use_cpu=True,
        report_to=[],
    )
    started, before = time.perf_counter(), cpu_seconds()
    rows = load_dataset("json", data_files=path, split="train")
    read = time.perf_counter() - started
    trainer = SFTTrainer(model, options, train_dataset=rows, processing_class=words)
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - before
    made: Any = trainer.train_dataset
    tokens = sum(map(len, made["input_ids"]))
    supervised = sum(label != -100 for row in made["labels"] for label in row)
    return {
        "seconds": seconds,
        "cpu": cpu,
        "read": read,
        "tokens": tokens,
        "supervised": supervised,
        "packs": len(made),
    }


WAYS = {"ours, 1 worker": (ours, 1), "ours, 2 workers": (ours, 2), "TRL, 2 processes": (trl, 2)}


class Held(threading.Thread):
    """Watches the memory of this process and of those below it: the most that was theirs alone, summed, in MiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0.0

    def run(self) -> None:
        """Look ten times a second."""
        while True:
            self.most = max(self.most, sum(map(_own, _tree(os.getpid()))) / 1024)
            time.sleep(0.1)


def _tree(process: int) -> Iterator[int]:
    yield process
    for thread in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            for child in thread.read_text().split():
                yield from _tree(int(child))


def _own(process: int, name: str = "RssAnon") -> int:
    """Memory of a process in KiB; mapped files are not counted, the kernel takes them back when it needs room."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1])
    return 0


def cpu_seconds() -> float:
    """Processor time of this process and of the children that it has waited for."""
    whose = (resource.getrusage(one) for one in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in whose)


def measured(way: str, path: Path, tokenizer: str) -> dict[str, float]:
    """One way in a process of its own, with empty caches."""
    cold = tempfile.mkdtemp(prefix="cold-", dir=path.parent)
    environment = {
        **os.environ,
        "PYTHONPATH": str(HOME),
        "ALIGN_CACHE": f"{cold}/align",
        "HF_HOME": f"{cold}/hf",
        "HF_DATASETS_CACHE": f"{cold}/datasets",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }
    words = [sys.executable, str(Path(__file__).resolve()), "--way", way, "--path", str(path), "--tokenizer", tokenizer]
    try:
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found
    finally:
        shutil.rmtree(cold, ignore_errors=True)


def main() -> None:
    """Print the table of speeds, or that of memory."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--memory", type=int, default=0, help="measure memory, and on a file so many times as large too"
    )
    parser.add_argument("--tokenizer", default=str(HOME / "align" / "models" / "nano"))
    parser.add_argument("--way", help="used by itself")
    parser.add_argument("--path", help="used by itself")
    asked = parser.parse_args()
    if asked.way:
        print(json.dumps(alone(asked.way, asked.path, asked.tokenizer)))
        return
    with tempfile.TemporaryDirectory(prefix="align-data-") as folder:
        path = Path(folder) / "rows.jsonl"
        if asked.memory:
            sizes = (asked.rows, asked.rows * asked.memory)
            memory({rows: measured("ours, 2 workers", write(path, rows), asked.tokenizer) for rows in sizes})
            return
        write(path, asked.rows)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
        for _ in range(asked.rounds):
            for name in WAYS:
                found[name].append(measured(name, path, asked.tokenizer))
                print(name, found[name][-1], file=sys.stderr, flush=True)
        print(f"{asked.rows:,} conversations, {path.stat().st_size / 2**20:.0f} MiB, {asked.rounds} rounds\n")
        speeds(found, asked.rows)


def alone(name: str, path: str, tokenizer: str) -> dict[str, float]:
    """One way in this process, with the memory that it took."""
    held = Held()
    held.start()
    way, workers = WAYS[name]
    found = way(path, tokenizer, workers)
    return {**found, "main": _own(os.getpid(), "VmHWM") / 1024, "all": held.most}


def speeds(found: dict[str, list[dict[str, float]]], rows: int) -> None:
    """Rows a second of every way, and how many times as fast as TRL it was, paired by round."""
    base = found["TRL, 2 processes"]
    head = ["way", "rows/s", "spread", "times TRL", "spread", "times its constructor", "processor ms a row"]
    head += ["tokens", "supervised", "packs"]
    print("| " + " | ".join(head) + " |")
    print("| " + " | ".join(["---"] * len(head)) + " |")
    for name, rounds in found.items():
        rates = [rows / one["seconds"] for one in rounds]
        ratios = [other["seconds"] / one["seconds"] for one, other in zip(rounds, base, strict=True)]
        apart = [(other["seconds"] - other["read"]) / one["seconds"] for one, other in zip(rounds, base, strict=True)]
        numbers = [f"{rounds[0][key]:,.0f}" for key in ("tokens", "supervised", "packs")]
        cells = [
            name,
            f"{statistics.median(rates):,.0f}",
            f"{min(rates):,.0f}-{max(rates):,.0f}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f}-{max(ratios):.2f}",
            f"{statistics.median(apart):.2f}",
            f"{statistics.median(1000 * one['cpu'] / rows for one in rounds):.2f}",
            *numbers,
        ]
        print("| " + " | ".join(cells) + " |")
    print()


def memory(found: dict[int, dict[str, float]]) -> None:
    """Most memory of the main process, mapped files included, and of all processes together, without them."""
    print("| rows | rows/s | main process, MiB | all processes without mapped files, MiB |")
    print("| --- | --- | --- | --- |")
    for rows, one in found.items():
        print(f"| {rows:,} | {rows / one['seconds']:,.0f} | {one['main']:.0f} | {one['all']:.0f} |")


if __name__ == "__main__":
    main()
