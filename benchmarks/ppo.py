"""PPO against the last TRL with a PPOTrainer (1.12): LoRA on a random Llama, 16 replies an update of 64 tokens each.

    OMP_NUM_THREADS=1 python benchmarks/ppo.py [--size T] [--setting all|top|rloo|estimators] [--epochs 4] [--updates 3]
        [--rounds 2] [--document]

Sides take turns in processes of their own, each over the same prompts; the first update of a process is not counted.
With `--setting top` the LoRA of every role is in the top quarter of the blocks alone, and the sides are ours with and
without the trunk cache. With `--setting rloo` there is no critic: four replies to each of four prompts, against the
RLOOTrainer of the TRL that is installed. With `--setting estimators` the sides are our four estimators.
TRL's critic is trained in full, as TRL is used: another number of trained tensors than ours, whose critic is a LoRA. So
losses are not comparable; work is. Our looks at held-out prompts are off: TRL has none. TRL 1.12 is installed beside
the model that is made, in runs/benchmarks, at the first call; $ALIGN_BENCHMARKS names another folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import SIZES, Clock, Measured, arguments, cells, finish, missing, model_of

TRL, BATCH, GROUP, REPLY = "1.12.0", 16, 4, 64
WORK = Path(os.environ.get("ALIGN_BENCHMARKS", "runs/benchmarks")).resolve()
OWN = {
    "align": [],
    "align, trunk_cache=0": ["stages.ppo.trunk_cache=0"],
    "rloo": ["stages.ppo.advantage=rloo", f"stages.ppo.group_size={GROUP}"],
    "grpo": ["stages.ppo.advantage=grpo", f"stages.ppo.group_size={GROUP}"],
    "reinforce_pp": ["stages.ppo.advantage=reinforce_pp"],
    "gae": [],
}
"""Our sides, with their overrides."""
SIDES = {"all": ["align", "TRL"], "top": list(OWN)[:2], "rloo": ["align", "TRL"], "estimators": list(OWN)[2:]}
"""Which take turns: with the LoRA in all blocks, in the top quarter of them, without a critic, or our estimators."""
PEER: dict[str, Any] = {
    "output_dir": str(WORK / "trl_out"),
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": BATCH // 8,
    "learning_rate": 1e-5,
    "seed": 0,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
"""Settings of both of TRL's trainers: those of our sides, in float32, with activations kept."""
TEMPLATE = (
    "{%- for m in messages -%}{%- if m['role'] == 'assistant' -%}{{ 't3 ' + m['content'] + ' </s> ' }}"
    "{%- else -%}{{ 't2 ' + m['content'] + ' ' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 't3 ' }}{%- endif -%}"
)


def main() -> None:
    """Both sides in turns, or one of them where the environment names it."""
    options = arguments(
        __doc__, {"size": list(SIZES), "setting": list(SIDES)}, {"epochs": 4, "updates": 3, "rounds": 2}
    )
    if side := os.environ.get("ALIGN_SIDE"):
        peer_side = rloo_side if options.setting == "rloo" else trl_side
        found = align_side(options, OWN[side]) if side in OWN else peer_side(options)
        print("MEASURED " + json.dumps(vars(found)))
        return
    prepare(options.size)
    sides, peer = SIDES[options.setting], installed() if options.setting == "all" else None
    total = {side: Measured() for side in sides}
    for number in range(options.rounds):
        for side in sides if number % 2 else reversed(sides):
            one = alone(side, peer)
            total[side].seconds += one.seconds
            total[side].added_bytes += one.added_bytes
    finish("ppo", options, cells(total, BATCH), "replies", "Peak memory is that of all updates of a process.")


def installed() -> Path:
    """The folder of TRL 1.12, made at the first call."""
    peer = WORK / f"trl-{TRL}"
    if not peer.exists():
        words = ["install", "-q", "--no-deps", "--target", str(peer), f"trl=={TRL}"]
        done = subprocess.run([sys.executable, "-m", "pip", *words], check=False, capture_output=True, text=True)
        if done.returncode:
            missing(f"TRL {TRL}", RuntimeError(done.stderr.strip().splitlines()[-1]))
    return peer


def alone(side: str, peer: Path | None) -> Measured:
    """One side in a process of its own."""
    paths = [str(peer)] if side == "TRL" and peer else []
    surroundings = {**os.environ, "ALIGN_SIDE": side, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *sys.argv], env=surroundings, check=False, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
    if not lines:
        sys.exit(f"{side} did not finish:\n{done.stderr[-2000:]}")
    return Measured(**json.loads(lines[-1].removeprefix("MEASURED ")))


def prepare(size: str) -> None:
    """Model folder, data and a parent for each role, once."""
    from trl_turns import drawn, tokenizer

    folder = WORK / size
    if (folder / "top" / "reward_model").exists():
        return
    model_of(size).save_pretrained(folder / "model")
    made = tokenizer(SIZES[size][3])
    made.chat_template = TEMPLATE
    made.save_pretrained(folder / "model")
    prompts, replies = drawn(400, 60, 200, 0.7, 0, size), drawn(400, 30, 60, 0.5, 1, size)
    texts = [(text(prompt), text(reply)) for prompt, reply in zip(prompts, replies, strict=True)]
    write(folder / "prompts.jsonl", [{"prompt": prompt} for prompt, _ in texts])
    write(folder / "pairs.jsonl", [{"prompt": p, "chosen": r, "rejected": text(replies[-1])} for p, r in texts[:64]])
    write(folder / "talk.jsonl", [{"messages": [turn("user", p), turn("assistant", r)]} for p, r in texts[:64]])
    words = [f"data.conversations.path={folder}/talk.jsonl", f"data.preferences.path={folder}/pairs.jsonl"]
    for blocks in ("all", "top"):
        for stage, name in (("sft", f"sft-{blocks}"), ("reward_model", blocks)):
            short = [f"stages.{stage}.max_steps=1", f"stages.{stage}.batch_size=8"]
            run(folder, f"pipeline={stage}", f"name={name}", *words, *adapted(size, blocks), *short)


def adapted(size: str, blocks: str) -> list[str]:
    """The override that puts the LoRA into all blocks, or into the top quarter of them."""
    return [] if blocks == "all" else [f"adapter.layers=top_{SIZES[size][2] // 4}"]


def text(ids: list[int]) -> str:
    """Token ids as words of the tokenizer."""
    return " ".join(f"t{max(4, number)}" for number in ids)


def turn(role: str, content: str) -> dict[str, str]:
    """A message."""
    return {"role": role, "content": content}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(folder: Path, *words: str) -> None:
    """`align run` on the benchmark's model and data."""
    from align.cli.dispatch import main as align

    base = ["model=hf", f"model.path={folder}/model", "data=files", f"out={folder}"]
    if code := align(["run", *base, *words]):
        sys.exit(code)


def align_side(options: Any, more: Sequence[str]) -> Measured:
    """Processor seconds of every update but the first, from the beginning of one rollout to that of the next."""
    from align.rl import ppo
    from align.rl.rollouts import Rollouts

    folder, found, clocks = WORK / options.size, Measured(), []
    blocks = "top" if options.setting == "top" else "all"
    sample, improve = Rollouts.sample, ppo.improve

    def watched(self: Any, update: int) -> Any:
        marked(clocks, found)
        return sample(self, update)

    def ended(*given: Any) -> Any:
        last = improve(*given)
        marked(clocks, found)
        return last

    Rollouts.sample, ppo.improve = watched, ended  # type: ignore[method-assign]
    given = {"updates": options.updates + 1, "ppo_epochs": options.epochs, "batch_size": BATCH, "lr": 1e-5}
    given |= {"minibatches": 1, "micro_batch_size": 8, "max_new_tokens": REPLY, "critic_warmup": 0}
    given |= {"max_approx_kl": 1000, "kl_limit": 1000, "monitor": "off", "init": folder / f"sft-{blocks}" / "sft"}
    given |= {"reward": folder / blocks / "reward_model"}
    if options.setting == "rloo":
        given |= {"advantage": "rloo", "group_size": GROUP}
    words = [*(f"stages.ppo.{name}={value}" for name, value in given.items()), *adapted(options.size, blocks), *more]
    name = f"name=ppo-{time.time_ns()}"
    run(folder, "pipeline=ppo", name, f"data.prompts.path={folder}/prompts.jsonl", *words)
    return found


def marked(clocks: list[Clock], found: Measured) -> None:
    """One update ends and the next begins."""
    if len(clocks) > 1:
        clocks[-1].into(found)
    clocks.append(Clock())


def told(size: str) -> tuple[Any, list[str], Any]:
    """TRL's tokenizer, prompts as text, and its model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = WORK / size
    words = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = ["t2 " + json.loads(line)["prompt"] + " t3" for line in lines]
    return words, prompts, AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32")


def scorer(size: str) -> Any:
    """A reward model, or a critic, of TRL."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(WORK / size / "model", num_labels=1, dtype="float32")


def marks(clocks: list[Clock], found: Measured, steps: int) -> Any:
    """A callback for which so many of a trainer's steps are an update."""
    from transformers import TrainerCallback

    class Marks(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            marked(clocks, found)

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step % steps == 0:
                marked(clocks, found)

    return Marks()


def trl_side(options: Any) -> Measured:
    """The same of TRL's PPOTrainer."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    found, clocks = Measured(), list[Clock]()
    words, prompts, model = told(options.size)
    config = PPOConfig(
        num_mini_batches=1,
        total_episodes=BATCH * (options.updates + 1),
        num_ppo_epochs=options.epochs,
        response_length=REPLY,
        local_rollout_forward_batch_size=BATCH,
        num_sample_generations=0,
        stop_token="eos",
        temperature=1.0,
        **PEER,
    )

    PPOTrainer(
        args=config,
        processing_class=words,
        model=model,
        ref_model=None,
        reward_model=scorer(options.size),
        value_model=scorer(options.size),
        train_dataset=Dataset.from_list([{"input_ids": words(prompt)["input_ids"]} for prompt in prompts]),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[marks(clocks, found, 1)],
    ).train()
    return found


def rloo_side(options: Any) -> Measured:
    """TRL's RLOOTrainer: no critic, groups of replies, float32, activations kept."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import RLOOConfig, RLOOTrainer

    found, clocks = Measured(), list[Clock]()
    words, prompts, model = told(options.size)
    config = RLOOConfig(
        num_generations=GROUP,
        num_iterations=options.epochs,
        max_steps=options.epochs * (options.updates + 1),
        max_completion_length=REPLY,
        **PEER,
    )
    RLOOTrainer(
        model=model,
        reward_funcs=scorer(options.size),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=words,
        reward_processing_classes=words,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[marks(clocks, found, options.epochs)],
    ).train()
    return found


if __name__ == "__main__":
    main()
