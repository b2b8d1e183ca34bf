"""What each of two processes does for `tests/align/models/test_sharding.py`: runs, then every method with and without
a base in parts, and full tuning in parts. Started by torchrun with lists of overrides and of cases, and a folder for
what it finds.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from align.checkpoints.compatibility import ParentMode
from align.config.compose import compose
from align.config.registries import adapters
from align.config.schema import Load, OnParent, Shard
from align.models import shared_base
from align.models.sharding import held, layers_of, own_weights_whole
from align.roles import Bases, Role
from align.stages.supervised import groups_of, hooks_of
from align.training import resume
from align.training.objectives import LanguageModeling
from align.training.optimizer import Updater
from align.training.options import Optimizer
from align.training.processes import Processes
from align.training.resume import StateSaver
from tests.tiny import save_tiny_llama
from tests.tiny_chain import HOME, bases, execute, fresh, logits
from tests.tiny_training import options, token_rows

CASES: dict[str, tuple[str, Load, dict[str, Any]]] = {
    **{
        name: (name, Load.nf4 if kind().quantization() else Load.fp32, {})
        for name, kind in adapters.items()
        if not kind.traits.owns_weights
    },
    "dora": ("lora", Load.fp32, {"dora": True}),
    "pissa": ("lora", Load.fp32, {"init": "pissa", "rank": 4}),
    "literal": ("delta_lora", Load.fp32, {"form": "literal"}),
    "bf16": ("lora", Load.bf16, {}),
    "dora_nf4": ("lora", Load.nf4, {"dora": True}),
    "feature_extraction_nf4": ("feature_extraction", Load.nf4, {}),
    "recomputed": ("lora", Load.fp32, {}),
}
"""Name -> method, precision of the base, options of the method."""
ODD = 275
"""Rows of an embedding that two processes cannot halve."""


def trained(case: str, shard: Shard, process: Processes) -> dict[str, Any]:
    """A method after three steps in which one process makes more passes than the other, as hashes."""
    method, load, given = CASES[case]
    found = bases()
    found.shard = shard
    role = fresh(method, load, found, **typed(method, given))
    if case == "recomputed":
        role.tree.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    objective, plain = LanguageModeling(role), options(max_steps=3, lr=0.1)
    updater = Updater(objective, groups_of(role, 0.1, plain), plain, 3, process, hooks_of(role))
    own = token_rows(9)[process.process_index :: 2]
    objective.train()
    passes = [own[:2], own[2:3], own[3:]] if process.is_main_process else [own[:2], own[2:]]
    steps = [updater.step([objective.collate(rows) for rows in passes]) for _ in range(3)]
    once = updater.weighed([objective.collate([row]) for row in own])
    process.wait_for_everyone()
    return {
        "numbers": [steps, once],
        "weights": {name: digest(value) for name, value in updater.held().items()},
        "logits": digest(logits(role)),
    }


def in_float64(process: Accelerator, shard: Shard) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Full tuning in float64: weights after the last step, in the main process, and what was logged and is held.

    The rows of the embedding cannot be halved, passes are unequal, activations are computed again, and gradients are
    clipped.
    """
    found = bases(save_tiny_llama(HOME / "odd", vocab=ODD))
    found.shard = shard
    with patch.dict(shared_base._DTYPES, fp32=torch.float64), patch.object(shared_base, "TRAINED", torch.float64):
        role = found.fresh(None, adapters.get("full")(), ParentMode(None, Load.fp32), "policy")
    role.tree.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    plain = options(max_steps=4, lr=1e-2, optimizer=Optimizer.adamw, max_grad_norm=0.5)
    objective = LanguageModeling(role)
    updater = Updater(objective, groups_of(role, 1e-2, plain), plain, 4, process, hooks_of(role))
    own = token_rows(9)[process.process_index :: process.num_processes]
    passes = [own[:2], own[2:3], own[3:]] if process.is_main_process else [own[:2], own[2:]]
    objective.train()
    told = [updater.step([objective.collate(rows) for rows in passes]) for _ in range(3)]
    told.append(updater.weighed([objective.collate([row]) for row in own])[0])
    told.append(updater.step([objective.collate(rows) for rows in passes]))
    sizes = {
        "weights": sum(held(p).untyped_storage().nbytes() for p in updater.held().values()),
        "moments": sum(
            held(value).untyped_storage().nbytes()
            for state in updater.optimizer.state.values()
            for value in state.values()
            if value.dim()
        ),
    }
    with own_weights_whole(role.tree, here=process.is_main_process):
        weights = {name: p.detach() for name, p in role.tree.named_parameters()} if process.is_main_process else {}
    return weights, {"told": told, **sizes}


def stopped(words: list[str]) -> None:
    """A run that is stopped behind its first step, with its state kept."""
    offer = StateSaver.offer

    def once(self: StateSaver, updater: Updater, step: int, more: dict[str, Any]) -> None:
        offer(self, updater, step, more)
        raise KeyboardInterrupt

    with patch.object(StateSaver, "offer", once), patch.object(resume, "_SHARE", 0), suppress(KeyboardInterrupt):
        execute(compose(words))


def typed(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """Options with their enums."""
    from data_prep.core.options import convert, option_types

    kinds = option_types(adapters.get(method))
    return {name: convert(kinds[name], value, name) for name, value in given.items()}


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def held_by(roles: list[Role], found: Bases) -> dict[str, int]:
    """Bytes of the layers' matrices that this process holds for all roles together, and how many storages they are."""
    sizes = {}
    for role in roles:
        for layer in layers_of(role.tree):
            for p in layer.parameters():
                if p.dim() == 2 and not p.requires_grad:
                    sizes[held(p).untyped_storage().data_ptr()] = held(p).untyped_storage().nbytes()
    return {"bytes": sum(sizes.values()), "storages": len(sizes), "bases": len(found.opened())}


def shared(shard: Shard) -> dict[str, int]:
    """Four trees over one base, after each has computed something."""
    found = bases()
    found.shard = shard
    mode = ParentMode(OnParent.stack, Load.fp32)
    roles = [found.start_of(None, mode, name) for name in ("policy", "reference", "reward", "value")]
    for role in roles:
        logits(role)
    return held_by(roles, found)


def sent() -> dict[str, float]:
    """Bytes that this process receives in a forward pass and in one with gradients, and those of the base it keeps."""
    received = []
    name = "all_gather_single" if hasattr(torch.distributed, "all_gather_single") else "all_gather_into_tensor"
    gather = getattr(torch.distributed, name)

    def counted(output: torch.Tensor, given: torch.Tensor, **more: Any) -> Any:
        received.append(output.nbytes - given.nbytes)
        return gather(output, given, **more)

    found = bases()
    found.shard = Shard.base
    bare = found.start_of(None, ParentMode(OnParent.stack, Load.fp32), "policy")
    role = fresh("lora", Load.fp32, found)
    objective = LanguageModeling(role)
    setattr(torch.distributed, name, counted)
    try:
        logits(bare)
        forward = sum(received)
        objective(objective.collate(token_rows(2)))[0].backward()
    finally:
        setattr(torch.distributed, name, gather)
    kept = sum(held(p).nbytes for p in bare.tree.parameters())
    return {"forward": forward, "training": sum(received) - forward, "held": kept}


def main() -> None:
    torch.set_num_threads(1)
    words, cases, out = json.loads(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
    for one in words:
        if "name=again" in one:
            stopped(one)
            if os.environ["RANK"] == "0":
                shutil.copytree(out / "again", out / "stopped")
        execute(compose(one))
        gc.freeze()
    process = Processes(cpu=True)
    weights, told = in_float64(process, Shard.full)
    if process.is_main_process:
        save_file(weights, out / "float64.safetensors")
    found = {
        "float64": told,
        "shared": [shared(shard) for shard in (Shard.none, Shard.base)],
        "sent": sent(),
        **{case: [trained(case, shard, process) for shard in (Shard.none, Shard.base)] for case in cases},
    }
    (out / f"process-{process.process_index}.json").write_text(json.dumps(found), encoding="utf-8")
    process.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
