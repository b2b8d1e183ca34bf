"""What the benchmarks share: random Llamas, draws of lengths, and ways timed in turns.

Times are processor seconds of this process, so that other work on the machine counts little; every comparison is
between ways that took turns in one process. `OMP_NUM_THREADS=1` keeps waiting threads out of them.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from align.models.packing import ATTENTION

SIZES = {"T": (256, 688, 8, 8192), "S": (512, 2048, 8, 32000)}
"""Width, width of the feed-forward layers, layers and vocabulary: 9 and 50 million parameters."""
Way = Callable[[], None]


def model(hidden: int, layers: int, vocabulary: int, attention: str = ATTENTION, inner: int = 0) -> Any:
    """A random fp32 Llama with tied embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner or 3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def model_of(size: str, attention: str = ATTENTION) -> Any:
    """The random Llama of a size."""
    hidden, inner, layers, vocabulary = SIZES[size]
    return model(hidden, layers, vocabulary, attention, inner)


def lengths(count: int, low: int, high: int, middle: float, spread: float, seed: int = 0) -> list[int]:
    """Lognormal lengths between `low` and `high`."""
    draw = random.Random(seed)
    return [min(high, max(low, round(middle * draw.lognormvariate(0.0, spread)))) for _ in range(count)]


def sequences(count: int, low: int, high: int, vocabulary: int) -> list[list[int]]:
    """Token sequences with lognormal lengths between `low` and `high`."""
    draw = random.Random(0)
    return [[draw.randrange(2, vocabulary) for _ in range(n)] for n in lengths(count, low, high, 100, 0.7)]


@dataclass
class Measured:
    """What one way took, a number for each round."""

    seconds: list[float] = field(default_factory=list)
    added_bytes: list[int] = field(default_factory=list)
    """Highest memory above what the process held before; empty where the system does not tell."""

    def middle(self) -> float:
        """Median of the processor seconds."""
        return statistics.median(self.seconds)


def in_turns(ways: dict[str, Way], rounds: int, before: Callable[[int], None] | None = None) -> dict[str, Measured]:
    """Every way once a round, each round in another order, the first one thrown away; `before` opens a round."""
    names, found = list(ways), {name: Measured() for name in ways}
    for number in range(rounds + 1):
        if before is not None:
            before(number)
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            held = _memory("VmRSS")
            _forget_peak()
            started = time.process_time()
            ways[name]()
            seconds = time.process_time() - started
            if number:
                found[name].seconds.append(seconds)
                if held is not None:
                    found[name].added_bytes.append((_memory("VmHWM") or held) - held)
    return found


def _memory(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return


HEAD = ["way", "unit / cpu-s", "median cpu-s", "spread", "speed", "added memory"]


def table(found: dict[str, Measured], unit: float, what: str) -> list[list[str]]:
    """Print medians, spreads and added memory, and every way's speed over the last one's, paired by round."""
    reference = list(found)[-1]
    rows = []
    for name, measured in found.items():
        ratios = sorted(b / a for a, b in zip(measured.seconds, found[reference].seconds, strict=True))
        memory = max(measured.added_bytes) / 2**20 if measured.added_bytes else None
        rows.append(
            [
                name,
                f"{unit / measured.middle():.0f}",
                f"{measured.middle():.3f}",
                f"{min(measured.seconds):.3f}-{max(measured.seconds):.3f}",
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})",
                "-" if memory is None else f"{memory:.0f} MiB",
            ]
        )
    head = [HEAD[0], f"{what} / cpu-s", *HEAD[2:]]
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return rows
