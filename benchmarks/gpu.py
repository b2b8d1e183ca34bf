"""What a graphics card makes of training, decoding and PPO: one campaign of at most ten minutes that prints one JSON.

    python benchmarks/gpu.py [--parts sft-8b ppo-8b-nf4 ...] [--out runs/gpu] [--seconds 600] [--peer] [--dry]

Weights are random, of the shapes of Llama 3.2 1B and Llama 3.1 8B; rows are 2,048 tokens, rollouts 128 prompts of 256
tokens with replies of 256. A part that is done lies in OUT and is left out when the command is repeated, a part that
fails says why and the next begins, and none begins once SECONDS are spent. `--peer` also measures TRL's SFTTrainer
with packed rows, `--dry` runs everything at a tiny size on a CPU.

Model flops are 4 a weight and token of LoRA (forward, and backward without gradients of frozen weights) and causal
attention's; the peak that they are a share of is the card's dense bfloat16.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from align.adapters.lora import Lora
from align.config.schema import Load
from align.inference.generation import RolloutEngine, Sampling
from align.models.own_modules import put_in
from align.models.packing import ATTENTION
from align.models.shared_base import BaseIdentity, SharedBase
from align.rl.actor_critic import ActorCritic, PPOLoss
from align.rl.advantages import estimate
from align.rl.experience import PPORoles, RewardRule, Rollout, experience, judge, reward
from align.roles import Role, outputs
from align.runs.environment import facts, peak_gpu, reset_peak_gpu, versions
from align.runs.processes import join_processes
from align.stages.ppo import PPO
from align.stages.sft import SFT
from align.stages.supervised import groups_of, hooks_of
from align.training.objectives import LanguageModeling, Objective
from align.training.optimizer import Updater, autocast, ready_to_train
from data_prep.core.errors import said_by
from data_prep.types import PromptTokens, Tokens
from reward.head import ScalarHead

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bfloat16 operations a second, by a part of the card's name."""


@dataclass(frozen=True)
class Size:
    """A shape and how much work is done on it."""

    hidden: int
    inner: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    tied: bool
    row: int = 2048
    """Tokens of a training row."""
    rows: int = 8
    """Rows of an optimiser step."""
    steps: int = 6
    prompts: int = 128
    length: int = 256
    """Of a prompt, and of a reply."""
    micro_tokens: int = 8192


SIZES = {
    "1b": Size(2048, 8192, 16, 32, 8, 128256, tied=True),
    "8b": Size(4096, 14336, 32, 32, 8, 128256, tied=False),
}
TINY = Size(32, 48, 2, 4, 2, 300, True, row=24, rows=2, steps=3, prompts=4, length=6, micro_tokens=64)


@dataclass(frozen=True)
class Card:
    """Where the parts run."""

    device: torch.device
    name: str
    peak_flops: float | None
    folder: Path
    """What the parts write."""

    @classmethod
    def here(cls, folder: Path, dry: bool) -> Card:
        """The first CUDA device, or the CPU of a dry run."""
        if dry:
            return cls(torch.device("cpu"), "cpu", None, folder)
        if not torch.cuda.is_available():
            sys.exit("no CUDA device: --dry runs the parts at a tiny size on a CPU")
        name = torch.cuda.get_device_name()
        peak = next((flops for key, flops in PEAKS.items() if key in name), None)
        return cls(torch.device("cuda", 0), name, peak, folder)

    def seconds(self, work: Callable[[], Any]) -> float:
        """How long the device takes for it."""
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# ------------------------------------------------------------------------------------------------------------ models
def base_of(size: Size, load: Load, card: Card) -> SharedBase:
    """Random weights of a size, made on the device."""
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.groups,
        vocab_size=size.vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=size.tied,
    )
    torch.manual_seed(0)
    kind = torch.float32 if load is Load.fp32 else torch.bfloat16
    with card.device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, dtype=kind)
    if load.four_bit:
        quantise(model, card.device)
    base = SharedBase.freeze(model, BaseIdentity("random", None, "random"), load)
    put_in(base.model)
    return base


def quantise(model: Any, device: torch.device) -> None:
    """Put 4-bit layers in the place of the decoder's linear ones, one at a time."""
    import bitsandbytes as bnb

    for name, layer in list(model.model.layers.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            made = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            made.weight = bnb.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            parent, _, own = name.rpartition(".")
            setattr(model.model.layers.get_submodule(parent), own, made.to(device))
    vars(model)["is_loaded_in_4bit"] = True


def role_of(base: SharedBase, name: str, seed: int = 0, head: bool = False) -> Role:
    """A trainable LoRA of rank 16 on every linear layer."""
    torch.manual_seed(seed)
    lora = Lora(rank=16)
    return Role(
        name,
        lora.attach(base.tree(), trainable=True),
        lora,
        ScalarHead(base.model.config.hidden_size).to(base.device) if head else None,
    )


def updater_of(objective: Objective, roles: list[Role], options: Any, steps: int) -> Updater:
    """Optimiser steps as stages take them."""
    for role in roles:
        ready_to_train(role, options)
    groups = [group for role in roles for group in groups_of(role, 1e-4, options)]
    return Updater(objective.train(), groups, options, steps, join_processes(), [h for r in roles for h in hooks_of(r)])


def ids_of(count: int, length: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Rows of random token ids."""
    drawn = torch.Generator().manual_seed(seed)
    return torch.randint(5, vocabulary, (count, length), generator=drawn).tolist()  # type: ignore[no-any-return]


def weights_of(size: Size) -> int:
    """Weights that a token is multiplied with."""
    head_width = size.hidden // size.heads
    attention = size.hidden * head_width * (2 * size.heads + 2 * size.groups)
    return size.layers * (attention + 3 * size.hidden * size.inner) + size.hidden * size.vocabulary


def share_of_peak(size: Size, tokens_per_second: float, card: Card) -> float | None:
    """Model flops utilisation of LoRA on full rows."""
    attention = 2 * size.layers * size.row * size.hidden  # scores and sums over half of the row's tokens, forward
    flops = 4 * weights_of(size) + 3 * attention
    return tokens_per_second * flops / card.peak_flops if card.peak_flops else None


# ------------------------------------------------------------------------------------------------------------- parts
def sft(size: Size, load: Load, card: Card) -> dict[str, Any]:
    """Optimiser steps of LoRA on rows of one length; the first two are not counted."""
    role = role_of(base_of(size, load, card), "policy")
    options = SFT(batch_size=size.rows, micro_tokens=size.micro_tokens)
    objective = LanguageModeling(role)
    updater = updater_of(objective, [role], options, size.steps)
    rows = [
        Tokens(ids, [False, *([True] * (len(ids) - 1))], "row") for ids in ids_of(size.rows, size.row, size.vocabulary)
    ]
    each = max(1, size.micro_tokens // size.row)
    parts = [rows[start : start + each] for start in range(0, len(rows), each)]
    spent = [card.seconds(lambda: updater.step([objective.collate(part) for part in parts])) for _ in range(size.steps)]
    middle = sorted(spent[2:])[len(spent[2:]) // 2]
    speed = size.rows * size.row / middle
    return {"tokens_per_second": speed, "flops_share": share_of_peak(size, speed, card), "seconds": spent}


def rollout(size: Size, load: Load, card: Card) -> dict[str, Any]:
    """Replies of full length to prompts of one length, the second time."""
    role = role_of(base_of(size, load, card), "policy").freeze()
    engine, prompts = RolloutEngine(role, -1), ids_of(size.prompts, size.length, size.vocabulary)

    def work(tokens: int) -> None:
        with autocast(PPO(), card.device):
            engine.generate(prompts, Sampling(tokens), torch.Generator(device=card.device).manual_seed(0))

    work(2)
    spent = card.seconds(lambda: work(size.length))
    return {
        "seconds": spent,
        "tokens_per_second": size.prompts * size.length / spent,
        "ms_a_token": 1e3 * spent / size.length,
    }


def ppo(size: Size, load: Load, card: Card) -> dict[str, Any]:
    """One whole update with four roles on one base: replies, their experience, a pass over four minibatches."""
    base = base_of(size, load, card)
    policy, value = role_of(base, "policy"), role_of(base, "value", seed=1, head=True)
    reference, judged_by = Role("reference", base.tree(), None).freeze(), role_of(base, "reward", 2, head=True).freeze()
    roles = PPORoles(policy, reference, judged_by, value)
    options = PPO(
        batch_size=size.prompts, max_new_tokens=size.length, micro_tokens=size.micro_tokens, gradient_checkpointing=True
    )
    objective = ActorCritic(policy, value, PPOLoss(temperature=options.temperature))
    updater = updater_of(objective, [policy, value], options, options.minibatches)
    prompts = [
        PromptTokens(ids, "", str(i)) for i, ids in enumerate(ids_of(size.prompts, size.length, size.vocabulary))
    ]
    rule = RewardRule(options.kl_coef, 0.0, 1.0, 10.0, 0.0, 1.0, options.lam, options.temperature)
    engine, seconds, kept = RolloutEngine(policy, -1), dict[str, float](), SimpleNamespace()

    def sample() -> None:
        generator = torch.Generator(device=card.device).manual_seed(0)
        with autocast(options, card.device):
            sampling = Sampling(size.length, options.temperature)
            kept.rollout = Rollout(prompts, engine.generate([row.ids for row in prompts], sampling, generator))

    def score() -> None:
        kept.judged = judge(roles, kept.rollout, options.temperature, options)
        rewards = reward(kept.judged, kept.rollout, rule)
        kept.rows = experience(kept.rollout, kept.judged, estimate(rewards, kept.judged, rule, lambda total: total))

    def learn() -> None:
        objective.train()
        each, kept.numbers = len(kept.rows) // options.minibatches, []
        fit = max(1, size.micro_tokens // (2 * size.length))
        for start in range(0, len(kept.rows), each):
            part = kept.rows[start : start + each]
            cut = [objective.collate(part[i : i + fit]) for i in range(0, len(part), fit)]
            kept.numbers.append(updater.step(cut))

    for name, work in (("rollout", sample), ("score", score), ("update", learn)):
        seconds[name] = card.seconds(work)
    first = kept.numbers[0]
    gaps = {"ratio_dev": first["max_ratio_dev"], "ratio_dev_mean": first["ratio_dev_mean"], "rollout": kept.judged.gap}
    return {"pairs_per_second": size.prompts / sum(seconds.values()), "seconds": seconds, "step0": gaps}


def gaps(size: Size, load: Load, card: Card) -> dict[str, Any]:
    """How far the log-probabilities of one policy are apart: sampled, computed again, in passes of another shape."""
    small = replace(size, prompts=min(16, size.prompts), length=min(64, size.length), steps=1)
    whole = ppo(small, load, card)["step0"]
    cut = ppo(replace(small, micro_tokens=2 * small.length), load, card)["step0"]
    return {"as the stage cuts them": whole, "one row a pass": cut}


def saving(size: Size, load: Load, card: Card) -> dict[str, Any]:
    """Whether an adapter that was trained a step, saved and loaded again computes the same; and its merge."""
    base = base_of(size, load, card)
    role = role_of(base, "policy")
    objective = LanguageModeling(role)
    updater = updater_of(objective, [role], SFT(), 4)
    rows = [Tokens(ids, [True] * len(ids), "row") for ids in ids_of(2, size.row // 4, size.vocabulary)]
    updater.step([objective.collate(rows)])
    role.eval()
    probe = [row.ids[:32] for row in rows]
    folder = card.folder / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lora = role.adapter
    assert lora is not None
    lora.save(role.carrier, folder)
    again = Role("again", lora.load(base.tree(), folder, trainable=False), lora).freeze()
    merged = Role("merged", lora.merge(lora.load(base.private(), folder, trainable=False)), None).freeze()
    found = [torch.tensor(outputs(one, probe)) for one in (role, again, merged)]
    return {
        "reload_gap": float((found[1] - found[0]).abs().max()),
        "merge_gap": float((found[2] - found[0]).abs().max()),
    }


def chain(size: Size, load: Load, card: Card) -> dict[str, Any]:
    """RLHF on the embedded model by the command line: stopped in its first stage, gone on with, verified and merged."""
    from align.cli.dispatch import main as command

    out = card.folder / "chain"
    shutil.rmtree(out, ignore_errors=True)
    updates, steps = (1, 2) if size is TINY else (6, 30)
    words = [f"out={out}", "name=chain", f"stages.sft.max_steps={steps}", f"stages.reward_model.max_steps={steps}"]
    words += [f"stages.ppo.updates={updates}", "stages.ppo.critic_warmup=0", "stages.evaluate.prompts=16"]
    words += ["stages.ppo.batch_size=16", "stages.ppo.minibatches=2"] if size is TINY else []
    started = time.perf_counter()
    with stopping(steps // 2):
        stopped = command(["run", *words])
    codes = {"gone on": command(["run", *words]), "found done": command(["run", *words])}
    codes["verify"] = command(["verify", str(out / "chain")])
    codes["merge"] = command(["merge", f"{out}/chain/ppo", f"to={out}/merged"])
    if not stopped or any(codes.values()):
        raise RuntimeError(f"exit codes: {stopped} where it was stopped, then {codes}")
    record = json.loads((out / "chain/run.json").read_text(encoding="utf-8"))
    stages = {one["name"]: one["seconds"] for one in record["stages"]}
    return {"seconds": time.perf_counter() - started, "stages": stages}


@contextmanager
def stopping(step: int) -> Iterator[None]:
    """Inside, the first run is asked to end, as by Ctrl-C, once it has taken so many optimiser steps."""
    original = Updater.step

    def asked(self: Updater, *given: Any, **more: Any) -> dict[str, float]:
        if self.step_number == step:
            signal.raise_signal(signal.SIGINT)
        return original(self, *given, **more)

    Updater.step = asked  # type: ignore[method-assign]
    try:
        yield
    finally:
        Updater.step = original  # type: ignore[method-assign]


def peer(size: Size, load: Load, card: Card) -> dict[str, Any]:
    """TRL's SFTTrainer with LoRA and packed rows, flash attention and Liger where they are installed."""
    from importlib.util import find_spec

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from trl_turns import tokenizer

    model = base_of(size, load, card).model
    flash, marks = find_spec("flash_attn") is not None, list[float]()
    model.set_attn_implementation("flash_attention_2" if flash and card.device.type == "cuda" else "sdpa")

    class Marks(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            card.wait()
            marks.append(time.perf_counter())

    each = max(1, size.micro_tokens // size.row)
    config = SFTConfig(
        output_dir=str(card.folder / "trl"),
        per_device_train_batch_size=each,
        gradient_accumulation_steps=max(1, size.rows // each),
        max_steps=size.steps,
        max_length=size.row,
        packing=flash,
        gradient_checkpointing=False,
        bf16=card.device.type == "cuda",
        use_cpu=card.device.type == "cpu",
        use_liger_kernel=find_spec("liger_kernel") is not None,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = Dataset.from_list([{"input_ids": ids} for ids in ids_of(size.rows * size.steps, size.row, size.vocabulary)])
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    SFTTrainer(
        model, config, None, rows, processing_class=tokenizer(size.vocabulary), peft_config=lora, callbacks=[Marks()]
    ).train()
    spent = sorted(b - a for a, b in pairwise(marks[1:]))
    speed = size.rows * size.row / spent[len(spent) // 2]
    return {"tokens_per_second": speed, "flops_share": share_of_peak(size, speed, card), "flash": flash}


PARTS: dict[str, tuple[Callable[..., dict[str, Any]], str, Load]] = {
    "chain": (chain, "1b", Load.fp32),
    "gaps-1b-fp32": (gaps, "1b", Load.fp32),
    "gaps-1b-bf16": (gaps, "1b", Load.bf16),
    "saving-1b-bf16": (saving, "1b", Load.bf16),
    "saving-1b-nf4": (saving, "1b", Load.nf4),
    "sft-1b": (sft, "1b", Load.bf16),
    "sft-8b": (sft, "8b", Load.bf16),
    "sft-8b-nf4": (sft, "8b", Load.nf4),
    "rollout-8b": (rollout, "8b", Load.bf16),
    "ppo-8b-bf16": (ppo, "8b", Load.bf16),
    "ppo-8b-nf4": (ppo, "8b", Load.nf4),
    "peer-sft-1b": (peer, "1b", Load.bf16),
    "peer-sft-8b": (peer, "8b", Load.bf16),
}
"""In the order in which they run: whether it works first, then how fast."""


# ---------------------------------------------------------------------------------------------------------- campaign
def measured(name: str, card: Card, dry: bool) -> dict[str, Any]:
    """One part with its time and peak; a failure is what the part found."""
    work, size, load = PARTS[name]
    reset_peak_gpu(str(card.device))
    started = time.perf_counter()
    try:
        found = work(TINY if dry else SIZES[size], load, card)
    except Exception as error:  # the next part may still work, and what failed is said
        found = {"error": f"{type(error).__name__}: {said_by(error)}"}
    found |= {"part_seconds": time.perf_counter() - started, "peak_gpu_bytes": peak_gpu(str(card.device))}
    gc.collect()
    if card.device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def campaign(parts: list[str], out: Path, seconds: float, dry: bool) -> dict[str, Any]:
    """Every part that is not done yet, each kept as it ends; what all of them found."""
    card, began = Card.here(out / "work", dry), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for name in parts:
        place = out / f"{name}.json"
        if place.is_file():
            found[name] = json.loads(place.read_text(encoding="utf-8"))
        elif time.perf_counter() - began > seconds:
            found[name] = {"left": f"{seconds:.0f} seconds are spent: the same command goes on"}
        else:
            print(f"{name} ...", file=sys.stderr, flush=True)
            found[name] = measured(name, card, dry)
            if "error" not in found[name]:
                place.write_text(json.dumps(found[name]), encoding="utf-8")
    shapes = {name: asdict(size) for name, size in ({"tiny": TINY} if dry else SIZES).items()}
    return {
        "card": card.name,
        "machine": facts(str(card.device)),
        "versions": versions(),
        "sizes": shapes,
        "parts": found,
    }


@contextmanager
def printing_nothing() -> Iterator[None]:
    """What the parts print goes to standard error: standard output is one JSON."""
    kept, sys.stdout = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout = kept


def main(words: list[str] | None = None) -> int:
    """Run the campaign; 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="where the parts that are done are kept")
    parser.add_argument("--seconds", type=float, default=600.0, help="no part begins after so many")
    parser.add_argument("--peer", action="store_true", help="also TRL's trainer")
    parser.add_argument("--dry", action="store_true", help="a tiny size on a CPU")
    options = parser.parse_args(words)
    parts = options.parts or [name for name in PARTS if options.peer or not name.startswith("peer")]
    with printing_nothing():
        found = campaign(parts, options.out, options.seconds, options.dry)
    print(json.dumps(found, indent=1))
    return int(any("error" in part for part in found["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
