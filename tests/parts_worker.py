"""What each of two processes does for `tests/align/models/test_sharding.py`: runs, then every method with and without
a base in parts. Started by torchrun with lists of overrides and of cases, and a folder for what it finds.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from align.checkpoints.compatibility import ParentMode
from align.config.compose import compose
from align.config.registries import adapters
from align.config.schema import Load, OnParent
from align.models.sharding import held, layers_of
from align.roles import Bases, Role
from align.stages.supervised import groups_of, hooks_of
from align.training.objectives import LanguageModeling
from align.training.optimizer import Updater
from align.training.processes import Processes
from tests.tiny_chain import bases, execute, fresh, logits
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


def trained(case: str, in_parts: bool, process: Processes) -> dict[str, Any]:
    """A method after three steps in which one process makes more passes than the other, as hashes."""
    method, load, given = CASES[case]
    found = bases()
    found.in_parts = in_parts
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


def shared(in_parts: bool) -> dict[str, int]:
    """Four trees over one base, after each has computed something."""
    found = bases()
    found.in_parts = in_parts
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
    found.in_parts = True
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
        execute(compose(one))
        gc.freeze()
    process = Processes(cpu=True)
    found = {
        "shared": [shared(in_parts) for in_parts in (False, True)],
        "sent": sent(),
        **{case: [trained(case, in_parts, process) for in_parts in (False, True)] for case in cases},
    }
    (out / f"process-{process.process_index}.json").write_text(json.dumps(found), encoding="utf-8")
    process.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
