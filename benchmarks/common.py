"""What the benchmarks share: random Llamas, draws of lengths, and ways timed in turns.

Times are processor seconds of this process, so that other work on the machine counts little; every comparison is
between ways that took turns in one process. `OMP_NUM_THREADS=1` keeps waiting threads out of them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from names import one_of
from pages import write_measured
from transformers import AutoModelForCausalLM, LlamaConfig

from align.models.packing import ATTENTION

SIZES = {"T": (256, 688, 8, 8192), "S": (512, 2048, 8, 32000)}
"""Width, width of the feed-forward layers, layers and vocabulary: 9 and 50 million parameters."""
Way = Callable[[], None]
PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"


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
            clock = Clock()
            ways[name]()
            if number:
                clock.into(found[name])
    return found


class Clock:
    """Processor seconds and memory from its making on."""

    def __init__(self) -> None:
        _give_back()
        self.held = _memory("VmRSS")
        _forget_peak()
        self.started = time.process_time()

    def into(self, measured: Measured) -> None:
        """Add what has been used until now as one more round."""
        measured.seconds.append(time.process_time() - self.started)
        if self.held is not None:
            measured.added_bytes.append(max(0, (_memory("VmHWM") or self.held) - self.held))


def _memory(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def _give_back() -> None:
    """Let the C library return what was freed, so that one way's memory does not hide that of the next."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return


def cells(found: dict[str, Measured], unit: float = 1.0) -> list[list[str]]:
    """One row a way: speed, median and spread of its times, speed over the last way's by round, added memory."""
    reference = list(found)[-1]
    rows = []
    for name, measured in found.items():
        ratios = sorted(b / a for a, b in zip(measured.seconds, found[reference].seconds, strict=True))
        memory = max(measured.added_bytes) / 2**20 if measured.added_bytes else None
        rate = unit / measured.middle()
        rows.append(
            [
                name,
                f"{rate:.0f}" if rate >= 100 else f"{rate:.2f}",
                f"{measured.middle():.3f}",
                f"{min(measured.seconds):.3f}-{max(measured.seconds):.3f}",
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})",
                "-" if memory is None else f"{memory:.0f} MiB",
            ]
        )
    return rows


def head_of(what: str) -> list[str]:
    """Titles of the columns of `cells`; `what` is done per second."""
    return ["way", f"{what} / cpu-s", "median cpu-s", "spread", "speed", "added memory"]


def table(found: dict[str, Measured], unit: float, what: str) -> list[list[str]]:
    """Print what `cells` has; the rows."""
    rows, head = cells(found, unit), head_of(what)
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return rows


def write_part(name: str, head: list[str], rows: list[list[str]], note: str = "") -> None:
    """Replace the part `<!-- measured: NAME -->` of docs/performance.md by a table and the command that made it."""
    lines = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    words = [f"`{command}`, torch {torch.__version__}, one thread of a shared {platform.machine()} machine."]
    part = "\n".join([*lines, "", *words, *([note] if note else [])]) + "\n"
    write_measured(PAGE, name, part)


def arguments(words: str | None, choices: dict[str, list[str]], numbers: dict[str, int]) -> argparse.Namespace:
    """The command line: a choice each with its first value as default, whole numbers, and --document."""
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, values in choices.items():
        parser.add_argument(f"--{name}", type=one_of(name, values), choices=values, default=values[0])
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--document", action="store_true", help="write the table into docs/performance.md")
    return parser.parse_args()


def missing(peer: str, error: Exception) -> NoReturn:
    """End because a peer is not there, which is said and not hidden in a table without it."""
    sys.exit(f"{peer} is missing ({error}): install it beside this project, as `pip install trl` does")


def finish(subject: str, options: argparse.Namespace, rows: list[list[str]], what: str, note: str = "") -> None:
    """Print a subject's table, and write it into the document where that was asked for."""
    head = head_of(what)
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(note)
    if options.document:
        how = [str(getattr(options, option)) for option in ("setting", "prompt") if option in options]
        name = " ".join([subject, options.size, *how])
        write_part(name, head, rows, note)
