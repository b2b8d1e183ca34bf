"""Supervised fine-tuning against TRL's SFTTrainer: LoRA on a random Llama, the same rows and weights, step by step.

    OMP_NUM_THREADS=1 python benchmarks/sft.py [--size T] [--setting defaults|fp32|bf16] [--steps 10] [--document]

Both sides take turns in one process. Their losses are compared: they differ by rounding alone. TRL is measured at its
defaults and at its best setting of each precision (`benchmarks/trl_turns.py:SETTINGS`).
"""

from __future__ import annotations

from typing import Any

from common import SIZES, arguments, cells, finish, missing, model_of
from trl_turns import SETTINGS, Turns, copy_adapter, drawn, own_side, peer_config, tokenizer

from align.stages.sft import SFT
from align.training.objectives import LanguageModeling
from data_prep.types import Tokens

ROWS = 1600


def rows_of(inputs: Any) -> list[Tokens]:
    """A batch of TRL's as rows of ours."""
    found = []
    for ids, labels, seen in zip(inputs["input_ids"], inputs["labels"], inputs["attention_mask"], strict=True):
        length = int(seen.sum())
        found.append(Tokens(ids[:length].tolist(), (labels[:length] != -100).tolist(), "row"))
    return found


def main() -> None:
    """One setting of TRL against ours."""
    options = arguments(__doc__, {"size": list(SIZES), "setting": list(SETTINGS)}, {"steps": 10})
    try:
        from datasets import Dataset
        from peft import LoraConfig
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        missing("TRL", error)
    prompts = drawn(ROWS, 60, 200, 0.7, 0, options.size)
    replies = drawn(ROWS, 80, 250, 0.9, 1, options.size)
    rows = [
        {"input_ids": prompt + reply, "completion_mask": [0] * len(prompt) + [1] * len(reply)}
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    trainer = SFTTrainer(
        model=model_of(options.size, "sdpa"),
        args=peer_config(SFTConfig, options.steps + 2, options.setting, completion_only_loss=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(SIZES[options.size][3]),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    role, updater = own_side(options.size, SFT, options.setting, LanguageModeling)
    copy_adapter(trainer.model, role.carrier)
    turns = Turns(trainer, updater, rows_of)
    trainer.train()
    unit = sum(turns.tokens) / len(turns.tokens)
    finish("sft", options, cells(turns.found, unit), "tokens", turns.told())


if __name__ == "__main__":
    main()
