"""A reward model against TRL's RewardTrainer: LoRA on a random Llama, the same pairs and weights, step by step.

    OMP_NUM_THREADS=1 python benchmarks/reward_model.py [--size T] [--setting defaults|fp32|bf16] [--prompt 60]
        [--steps 8] [--document]

Both sides take turns in one process. Their losses are compared: they differ by rounding alone. Ours computes a pair's
prompt once; `--prompt` is the median length of prompts. TRL's settings are those of `benchmarks/sft.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from common import SIZES, arguments, cells, finish, missing, model_of
from trl_turns import BATCH, SETTINGS, Turns, copy_adapter, drawn, own_side, peer_config, tokenizer

from align.stages.reward_model import RewardModel
from align.training.objectives import Pairwise
from data_prep.types import PairTokens
from reward.head import ScalarHead

ROWS = 1600


def rows_of(inputs: Any) -> list[PairTokens]:
    """A batch of TRL's, chosen replies before rejected ones, as pairs of ours: what both begin with is the prompt."""
    rows = [
        ids[: int(seen.sum())].tolist() for ids, seen in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    half = len(rows) // 2
    found = []
    for chosen, rejected in zip(rows[:half], rows[half:], strict=True):
        limit = min(len(chosen), len(rejected)) - 1
        shared = next((place for place in range(limit) if chosen[place] != rejected[place]), limit)
        found.append(PairTokens(chosen[:shared], chosen[shared:], rejected[shared:], "pair"))
    return found


def classifier(size: str) -> Any:
    """TRL's model: the same random body with a score head."""
    from transformers import AutoModelForSequenceClassification

    plain = model_of(size, "sdpa")
    config = plain.config
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa")
    model.model.load_state_dict(plain.model.state_dict())
    return model


def main() -> None:
    """One setting of TRL against ours."""
    options = arguments(__doc__, {"size": list(SIZES), "setting": list(SETTINGS)}, {"prompt": 60, "steps": 8})
    try:
        from datasets import Dataset
        from peft import LoraConfig
        from trl import RewardConfig, RewardTrainer
    except ImportError as error:
        missing("TRL", error)
    prompts = drawn(ROWS, options.prompt, 600, 0.7, 0, options.size)
    chosen, rejected = (drawn(ROWS, 80, 250, 0.9, seed, options.size) for seed in (1, 2))
    pairs = [(prompt + one, prompt + two) for prompt, one, two in zip(prompts, chosen, rejected, strict=True)]
    rows = [{"chosen_ids": a, "rejected_ids": b, "length": max(len(a), len(b))} for a, b in pairs]
    grouping = {} if options.setting == "defaults" else {"length_column_name": "length", "remove_unused_columns": False}
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    trainer = RewardTrainer(
        model=classifier(options.size),
        args=peer_config(RewardConfig, options.steps + 2, options.setting, max_length=2048, **grouping),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(SIZES[options.size][3]),
        peft_config=lora,
    )
    role, updater = own_side(options.size, RewardModel, options.setting, Pairwise, ScalarHead(SIZES[options.size][0]))
    copy_adapter(trainer.model, role.carrier)
    score = next(p for name, p in trainer.model.named_parameters() if "score.modules_to_save" in name)
    assert role.head is not None
    with torch.no_grad():
        role.head.score.weight.copy_(score)
        role.head.score.bias.zero_()
    turns = Turns(trainer, updater, rows_of)
    trainer.train()
    finish("reward_model", options, cells(turns.found, BATCH), "pairs", turns.told())


if __name__ == "__main__":
    main()
