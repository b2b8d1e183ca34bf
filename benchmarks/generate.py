"""The rollout engine against transformers' `generate`, both with a LoRA adapter on a random Llama.

    OMP_NUM_THREADS=1 python benchmarks/generate.py [--size T] [--rows 16] [--new 64] [--rounds 5] [--document]

Greedy tokens of all ways are compared first; then all of them sample, in turns. `generate` is asked for no scores, so
it does less than the engine, which also returns the log-probability of every token. Its best setting is a LoRA merged
into the weights and a static cache; the engine merges nothing.
"""

from __future__ import annotations

import copy

import torch
from common import SIZES, arguments, cells, finish, in_turns, lengths, model_of

from align.adapters.lora import Lora
from align.inference.generation import RolloutEngine, Sampling
from align.models.own_modules import put_in
from align.roles import Role


def main() -> None:
    """Check that greedy tokens agree, then time sampling."""
    options = arguments(__doc__, {"size": list(SIZES)}, {"rows": 16, "new": 64, "rounds": 5})
    lora, vocabulary = Lora(rank=16), SIZES[options.size][3]
    ours, theirs = model_of(options.size).eval(), model_of(options.size, "sdpa").eval()
    theirs.load_state_dict(ours.state_dict())
    put_in(ours)
    carrier, peft = lora.attach(ours, trainable=False), lora.attach(theirs, trainable=False)
    stir(carrier, peft)
    merged = copy.deepcopy(peft).merge_and_unload()
    engine = RolloutEngine(Role("policy", carrier, lora).freeze(), end_id=-1)
    torch.manual_seed(1)
    drawn = lengths(options.rows, 20, 200, 60, 0.7)
    prompts = [torch.randint(5, vocabulary, (length,)).tolist() for length in drawn]
    width = max(drawn)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def generate(model: object, **how: object) -> list[list[int]]:
        settings = {"max_new_tokens": options.new, "eos_token_id": None, "pad_token_id": 0, **how}
        found: torch.Tensor = model.generate(input_ids=ids, attention_mask=mask, **settings)  # type: ignore[attr-defined]
        return found[:, width:].tolist()  # type: ignore[no-any-return]

    own = [reply.ids for reply in engine.generate(prompts, Sampling(options.new, greedy=True))]
    told = []
    for name, other in (("unmerged", peft), ("merged", merged)):
        found = generate(other, do_sample=False)
        same = [a == b for x, y in zip(own, found, strict=True) for a, b in zip(x, y, strict=True)]
        told.append(f"Greedy tokens equal to those of generate, {name}: {sum(same)} of {len(same)}.")
    freely = {"do_sample": True, "top_k": 0, "top_p": 1.0}
    ways = {
        "RolloutEngine (align)": lambda: engine.generate(prompts, Sampling(options.new)) and None,
        "generate, merged, static cache": lambda: (
            generate(merged, cache_implementation="static", disable_compile=True, **freely) and None
        ),
        "generate, merged": lambda: generate(merged, **freely) and None,
        "generate": lambda: generate(peft, **freely) and None,
    }
    found = cells(in_turns(ways, options.rounds), options.rows * options.new)
    finish("generate", options, found, "tokens", " ".join(told))


def stir(carrier: torch.nn.Module, peft: torch.nn.Module) -> None:
    """Give both adapters the same B that is not zero."""
    torch.manual_seed(3)
    with torch.no_grad():
        for (name, own), other in zip(carrier.named_parameters(), peft.parameters(), strict=True):
            if "lora_" in name:
                other.copy_(own.normal_(std=0.02) if "lora_B" in name else own)


if __name__ == "__main__":
    main()
