"""What merging changes: every mergeable method, trained a little on nano at every precision it allows, then merged.

DoRA and PiSSA are LoRA with other options, which merge in other ways, and have rows of their own.

    python benchmarks/merge_drift.py [--steps 10]

Columns: mean KL in nats per token, and largest difference of two logits, from what was trained to its merged weights,
in float32 and in bf16, on the texts that `align merge` measures on; and the KL that merging back into 4 bits would
cost, which `align merge` refuses.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional as bnb
from transformers import AutoTokenizer

import align
from align.adapters.lora import Init
from align.checkpoints.compatibility import ParentMode, choose_parent_mode
from align.config.registries import adapters
from align.config.schema import Load, OnParent, OnPrecisionChange
from align.inference.loaded import probe_rows
from align.models.fingerprint import base_fingerprint
from align.models.packing import ATTENTION
from align.models.shared_base import BaseIdentity
from align.roles import Bases, Role
from align.training.objectives import LanguageModeling
from align.weights.drift import Drift, measure, of_role
from align.weights.output import BOUNDS
from data_prep.core.errors import UserError
from data_prep.types import Tokens

FOLDER = Path(align.__file__).parent / "models" / "nano"
TEXTS = ("Ahoy! The sun be shining on us today, matey.", "Good morning. The coffee is ready.", "How was your day?")


VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    *((name, name, {}) for name in adapters.names()),
    ("lora, dora", "lora", {"dora": True}),
    ("lora, pissa", "lora", {"init": Init.pissa}),
]


def stands_on(adapter: Any, load: Load) -> bool:
    """Whether a method can stand on the base at this precision."""
    try:
        return choose_parent_mode(None, adapter, OnParent.auto, load, OnPrecisionChange.refuse).load is load
    except UserError:
        return False


def trained(bases: Bases, adapter: Any, load: Load, steps: int, tokenizer: Any) -> Role:
    """A role of the method after some steps of Adam on three texts."""
    torch.manual_seed(0)
    role = bases.fresh(None, adapter, ParentMode(None, load), "policy")
    rows = [Tokens(ids, [True] * len(ids), text) for text in TEXTS for ids in [tokenizer.encode(text)]]
    objective = LanguageModeling(role)
    batch = objective.collate(rows)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(role.carrier, 2e-3 * adapter.lr_factor))
    adapter.begin(role.carrier, optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        (objective(batch)[0] / batch.weight).backward()
        optimizer.step()
        adapter.after_step(role.carrier, optimizer, step + 1)
    return role.freeze()


def merged(bases: Bases, role: Role, load: Load) -> Any:
    """The role's method folded into a private float32 copy of its base."""
    assert role.adapter is not None
    with tempfile.TemporaryDirectory() as folder:
        role.adapter.save(role.carrier, Path(folder))
        carrier = role.adapter.load(bases.root(load).private(), Path(folder), trainable=False)
    return role.adapter.merge(carrier).requires_grad_(False)


def rounded(model: Any, dtype: torch.dtype) -> Any:
    """A copy of a model in another floating type."""
    return torch.nn.Module.to(copy.deepcopy(model), dtype)


@torch.no_grad()
def requantised(model: Any) -> Any:
    """A copy whose linear layers but the head went through 4 bits once more."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            packed, state = bnb.quantize_4bit(module.weight.data.contiguous(), quant_type="nf4")
            module.weight.data = bnb.dequantize_4bit(packed, state)
    return model


def drift(role: Role, model: Any, rows: list[list[int]]) -> Drift:
    """From what was trained to a plain model."""
    model.set_attn_implementation(ATTENTION)
    return measure(of_role(role), of_role(Role("merged", model, None).freeze()), rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    rows = probe_rows(tokenizer, [], 128)
    bases = Bases(FOLDER, BaseIdentity("nano", None, base_fingerprint(FOLDER)), torch.device("cpu"))
    print("bounds of align merge:", ", ".join(f"{name} {bound:.0e}" for name, bound in BOUNDS.items()))
    print("| method | base | fp32: KL | logits | bf16: KL | logits | 4-bit: KL (refused) |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for shown, method, given in sorted(VARIANTS):
        for load in (Load.fp32, Load.bf16, Load.nf4):
            adapter: Any = adapters.get(method)(**given)
            if not adapter.traits.mergeable or adapter.traits.owns_weights or not stands_on(adapter, load):
                continue
            role = trained(bases, adapter, load, options.steps, tokenizer)
            plain = merged(bases, role, load)
            exact, short = drift(role, plain, rows), drift(role, rounded(plain, torch.bfloat16), rows)
            again = drift(role, requantised(plain), rows)
            cells = [shown, load.value, f"{exact.kl:.0e}", f"{exact.max_logit:.0e}", f"{short.kl:.0e}"]
            print("| " + " | ".join([*cells, f"{short.max_logit:.0e}", f"{again.kl:.0e}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
