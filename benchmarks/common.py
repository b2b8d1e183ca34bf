"""What the benchmarks share: a random Llama, draws of lengths, and paired timing."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from align.models.packing import ATTENTION


def model(hidden: int, layers: int, vocabulary: int, attention: str = ATTENTION) -> Any:
    """A random fp32 Llama with tied embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def sequences(count: int, low: int, high: int, vocabulary: int) -> list[list[int]]:
    """Token sequences with lognormal lengths between `low` and `high`."""
    draw = random.Random(0)
    lengths = [min(high, max(low, round(draw.lognormvariate(4.6, 0.7)))) for _ in range(count)]
    return [[draw.randrange(2, vocabulary) for _ in range(length)] for length in lengths]


def paired(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every way, taken in turns in one process, the first round thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def table(seconds: dict[str, list[float]], unit: float, what: str) -> None:
    """Print medians and spreads, and every way's speed over the last one's, paired by round."""
    reference = list(seconds)[-1]
    print(f"{'way':<34} {what + '/s':>12} {'median s':>9} {'spread':>15} {'speed':>14}")
    for name, found in seconds.items():
        ratios = sorted(b / a for a, b in zip(found, seconds[reference], strict=True))
        middle = statistics.median(found)
        spread = f"{min(found):.3f}-{max(found):.3f}"
        ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        print(f"{name:<34} {unit / middle:>12.0f} {middle:>9.3f} {spread:>15} {ratio:>14}")
