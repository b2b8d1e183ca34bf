"""Functions with gradients written by hand against their plain forms, forward and backward, each alone.

    OMP_NUM_THREADS=1 python benchmarks/functions.py [--size T] [--tokens 1500] [--rounds 9] [--document]

Sizes are those of one layer of the random Llama of `benchmarks/common.py`. With --document the table in
docs/performance.md is replaced.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import SIZES, cells, in_turns, write_part
from names import one_of
from torch import Tensor

from align.models import own_functions as own

Call = Callable[..., Tensor]


def low_rank(out: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """peft's form of a LoRA term."""
    return out + F.linear(F.linear(x, down), up) * 2.0


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """transformers' form of RMSNorm."""
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def main() -> None:
    """Time every function beside its plain form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=one_of("size", SIZES), choices=list(SIZES), default="T")
    parser.add_argument("--document", action="store_true")
    for name, default in (("tokens", 1500), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    width, inner, _, vocabulary = SIZES[options.size]
    torch.manual_seed(0)
    n, half = options.tokens, options.tokens // 2

    def drawn(*sizes: tuple[int, ...]) -> list[Tensor]:
        return [torch.randn(*size).requires_grad_() for size in sizes]

    table, targets = torch.randn(vocabulary, width), torch.randint(0, vocabulary, (half,))
    pairs: dict[str, tuple[Call, Call, list[Tensor]]] = {
        "LoRA's term": (
            lambda out, *rest: own.add_low_rank(out * 1.0, *rest, 2.0),
            lambda out, *rest: low_rank(out * 1.0, *rest),
            drawn((n, inner), (n, width), (16, width), (inner, 16)),
        ),
        "RMSNorm": (lambda x: own.normalised(x, table[0], 1e-6), lambda x: norm(x, table[0]), drawn((n, width))),
        "SwiGLU": (own.gated, lambda gate, up: F.silu(gate) * up, drawn((n, inner), (n, inner))),
        "frozen head": (
            lambda x: own.head_logprobs(x, table, None, targets),
            lambda x: -F.cross_entropy(F.linear(x, table), targets, reduction="none"),
            drawn((half, width)),
        ),
    }
    rows = []
    for name, (ours, plain, given) in pairs.items():
        found = in_turns({"own": step(ours, given), "plain": step(plain, given)}, options.rounds)
        first, second = cells(found)
        rows.append([name, first[2], second[2], first[4], first[5], second[5]])
        print(rows[-1])
    head = ["function", "own, cpu-s", "plain, cpu-s", "speed", "own, added memory", "plain, added memory"]
    if options.document:
        write_part(f"functions {options.size}", head, rows)


def step(way: Call, given: list[Tensor]) -> Callable[[], None]:
    """Forward and backward of a function."""
    return lambda: way(*given).sum().backward(inputs=given)


if __name__ == "__main__":
    main()
