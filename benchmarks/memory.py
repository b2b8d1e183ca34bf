"""The peak memory of SFT steps against what `align plan` computes of them, each cell in a process of its own.

    OMP_NUM_THREADS=1 python benchmarks/memory.py METHOD WIDTH LAYERS ROWS TOKENS [--checkpointing]

Two steps on a random Llama, everything above the bare process counted. MALLOC_MMAP_THRESHOLD_=65536 in front lets the
C library give every freed tensor back at once: without it a CPU's process keeps more than the tensors that live.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from accelerate import Accelerator
from common import Clock, Measured, model
from names import one_of

from align.config.registries import adapters
from align.config.schema import Load
from align.models.own_modules import put_in
from align.models.shared_base import BaseIdentity, SharedBase
from align.planning.memory.parts import state_bytes
from align.planning.memory.trace import traced
from align.roles import Role
from align.stages.sft import SFT
from align.training.objectives import LanguageModeling
from align.training.optimizer import Updater, ready_to_train
from align.training.options import Optimizer
from data_prep.types import Tokens

VOCABULARY = 4096


def built(options: argparse.Namespace, device: str) -> tuple[SharedBase, LanguageModeling, SFT]:
    """Base, objective and stage of a cell."""
    adapter: Any = adapters.get(options.method)
    stage = SFT(gradient_checkpointing=options.checkpointing, max_steps=2)
    with torch.device(device):
        found = model(options.width, options.layers, VOCABULARY)
        put_in(found)
        base = SharedBase.freeze(found, BaseIdentity("random", None, "random"), Load.fp32)
        chosen = adapter()
        tree = base.private() if chosen.traits.owns_weights else base.tree()
        role = Role("policy", chosen.attach(tree, True), chosen)
    ready_to_train(role, stage)
    return base, LanguageModeling(role), stage


def planned(options: argparse.Namespace, rows: list[Tokens]) -> float:
    """Bytes of weights, adapters, states and the pass."""
    base, objective, _ = built(options, "meta")
    every = {id(t): t for module in (base.model, objective) for t in (*module.parameters(), *module.buffers())}
    learned = [tensor for tensor in every.values() if tensor.requires_grad]
    states = sum(state_bytes(tensor.numel(), Optimizer.adamw) for tensor in learned)
    peak = max(traced(objective, rows, VOCABULARY).peak, sum(tensor.nbytes for tensor in learned))
    return sum(tensor.nbytes for tensor in every.values()) + states + peak


def measured(options: argparse.Namespace, rows: list[Tokens]) -> int:
    """Bytes that two steps add to the process, the making of the model included."""
    found, clock = Measured(), Clock()
    _, objective, stage = built(options, "cpu")
    groups = [{"params": [p for p in objective.parameters() if p.requires_grad], "lr": 1e-4}]
    updater = Updater(objective, groups, stage, 2, Accelerator(cpu=True))
    for _ in range(2):
        updater.step([objective.collate(rows)])
    clock.into(found)
    return found.added_bytes[0]


def main() -> None:
    """One cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", type=one_of("method", adapters.names()), choices=adapters.names())
    for name in ("width", "layers", "rows", "tokens"):
        parser.add_argument(name, type=int)
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    asked = options.tokens // 3
    mask = [False] * asked + [True] * (options.tokens - asked)
    rows = [Tokens([5] * options.tokens, mask, "row") for _ in range(options.rows)]
    plan, real = planned(options, rows), measured(options, rows)
    print(f"planned {plan / 1e6:.0f} MB, measured {real / 1e6:.0f} MB, planned / measured {plan / real:.2f}")


if __name__ == "__main__":
    main()
