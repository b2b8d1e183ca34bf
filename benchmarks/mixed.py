"""Replies of several LoRA adapters in one batch, against one batch for each adapter, on a random Llama.

    python benchmarks/mixed.py [--hidden 256] [--layers 8] [--adapters 8] [--rows 32] [--new 32] [--repeats 5]

Greedy tokens of both ways are compared first; then both sample.
"""

from __future__ import annotations

import argparse

import torch
from common import in_turns, model, sequences, table

from align.adapters.lora import Lora
from align.config.schema import Load
from align.inference.generation import Reply, RolloutEngine, Sampling
from align.inference.mixed_batch import Mixed
from align.models.shared_base import BaseIdentity, SharedBase
from align.roles import Role

VOCABULARY = 8192


def main() -> None:
    """Check that replies agree, then time both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = (("hidden", 256), ("layers", 8), ("adapters", 8), ("rows", 32), ("new", 32), ("repeats", 5))
    for name, default in given:
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    plain = model(options.hidden, options.layers, VOCABULARY)
    base = SharedBase.freeze(plain, BaseIdentity("random", None, "0"), Load.fp32)
    roles, terms = {}, {}
    for number in range(options.adapters):
        lora = Lora()
        carrier = lora.attach(base.tree(), trainable=True)
        with torch.no_grad():
            for parameter in carrier.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.05)
        roles[f"task {number}"] = Role("policy", carrier, lora).freeze()
        terms[f"task {number}"] = [lora.low_rank_terms(carrier)]
    mixed = Mixed.over(base, terms)
    prompts = [row[:48] for row in sequences(options.rows, 20, 48, VOCABULARY)]
    rows = [(f"task {i % options.adapters}", prompt) for i, prompt in enumerate(prompts)]

    def together(sampling: Sampling) -> list[Reply]:
        return mixed.respond(rows, sampling, 1)

    def apart(sampling: Sampling) -> list[Reply]:
        found: list[Reply] = [Reply()] * len(rows)
        for name, role in roles.items():
            places = [i for i, (owner, _) in enumerate(rows) if owner == name]
            replies = RolloutEngine(role, 1).generate([rows[i][1] for i in places], sampling)
            for place, reply in zip(places, replies, strict=True):
                found[place] = reply
        return found

    greedy, sampling = Sampling(options.new, greedy=True), Sampling(options.new)
    same = [a.ids == b.ids for a, b in zip(together(greedy), apart(greedy), strict=True)]
    print(f"{options.rows} prompts, {options.adapters} adapters; equal greedy replies: {sum(same)} of {len(same)}")
    ways = {
        "one batch of mixed rows": lambda: together(sampling) and None,
        "one batch for each adapter": lambda: apart(sampling) and None,
    }
    table(in_turns(ways, options.repeats), options.rows * options.new, "tokens")


if __name__ == "__main__":
    main()
