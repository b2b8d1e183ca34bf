"""The rollout engine against transformers' `generate`, both with a LoRA adapter on a random Llama, sampling.

    python benchmarks/rollout.py [--hidden 256] [--layers 8] [--rows 32] [--new 48] [--repeats 5]

Greedy tokens of both are compared first. `generate` is asked for no scores, so it does less than the engine, which
also returns the log-probability of every token.
"""

from __future__ import annotations

import argparse

import torch
from common import model, paired, sequences, table

from align.adapters.lora import Lora
from align.inference.generation import RolloutEngine, Sampling
from align.models.packing import ATTENTION
from align.roles import Role

VOCABULARY = 8192


def main() -> None:
    """Check that greedy tokens agree, then time sampling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 256), ("layers", 8), ("rows", 32), ("new", 48), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    lora = Lora(rank=16)
    ours = model(options.hidden, options.layers, VOCABULARY, ATTENTION).eval()
    theirs = model(options.hidden, options.layers, VOCABULARY, "sdpa").eval()
    theirs.load_state_dict(ours.state_dict())
    carrier, peft = lora.attach(ours, trainable=False), lora.attach(theirs, trainable=False)
    engine = RolloutEngine(Role("policy", carrier, lora).freeze(), end_id=1, pad_id=0)
    prompts = [row[:64] for row in sequences(options.rows, 20, 64, VOCABULARY)]
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    for place, prompt in enumerate(prompts):
        ids[place, width - len(prompt) :] = torch.tensor(prompt)
    mask = (ids != 0).long()

    def generate(**how: object) -> torch.Tensor:
        return peft.generate(input_ids=ids, attention_mask=mask, max_new_tokens=options.new, **how)

    greedy = engine.generate(prompts, Sampling(options.new, greedy=True))
    same = [
        reply.ids == row[width:][: len(reply.ids)]
        for reply, row in zip(greedy, generate(do_sample=False).tolist(), strict=True)
    ]
    print(f"{options.rows} prompts, {options.new} new tokens; equal greedy replies: {sum(same)} of {len(same)}")
    ways = {
        "RolloutEngine (align)": lambda: engine.generate(prompts, Sampling(options.new)) and None,
        "transformers generate": lambda: generate(do_sample=True, top_k=0, top_p=1.0) is None,
    }
    table(paired(ways, options.repeats), options.rows * options.new, "tokens")


if __name__ == "__main__":
    main()
