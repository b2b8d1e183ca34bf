"""Packed rows with grouped attention against padded batches and a dense block mask, on a random Llama.

    python benchmarks/attention.py [--hidden 256] [--layers 8] [--rows 16] [--repeats 5]

All ways compute the same loss on the same rows; the largest difference between them is printed first.
"""

from __future__ import annotations

import argparse

import torch
from common import in_turns, model, sequences, table

from align.models.packing import ATTENTION, pack

VOCABULARY = 8192


def main() -> None:
    """Check that the ways agree, then time them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 256), ("layers", 8), ("rows", 16), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    ours = model(options.hidden, options.layers, VOCABULARY, ATTENTION)
    theirs = model(options.hidden, options.layers, VOCABULARY, "sdpa")
    theirs.load_state_dict(ours.state_dict())
    rows = sequences(options.rows, 20, 400, VOCABULARY)
    tokens = sum(map(len, rows))
    packed = pack(rows)
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)], mask[place, : len(row)] = torch.tensor(row), 1
    owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(row) for row in rows]))
    block = ((owner[:, None] == owner[None]) & torch.ones(tokens, tokens).tril().bool())[None, None]

    def grouped() -> torch.Tensor:
        out = ours.model(input_ids=packed.ids_1N, position_ids=packed.positions_1N, layout=packed.layout)
        return out.last_hidden_state[0]

    def padded() -> torch.Tensor:
        return theirs.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[mask.bool()]

    def dense() -> torch.Tensor:
        out = theirs.model(
            input_ids=packed.ids_1N, position_ids=packed.positions_1N, attention_mask=block, use_cache=False
        )
        return out.last_hidden_state[0]

    with torch.no_grad():
        expected = grouped()
        gap = max(float((way() - expected).abs().max()) for way in (padded, dense))
    print(f"{options.rows} rows, {tokens} tokens, padded {ids.numel()}; largest difference {gap:.1e}")
    ways = {
        "packed, grouped attention (align)": lambda: grouped().square().mean().backward(),
        "packed, dense block mask": lambda: dense().square().mean().backward(),
        "padded batch": lambda: padded().square().mean().backward(),
    }
    table(in_turns(ways, options.repeats), tokens, "tokens")


if __name__ == "__main__":
    main()
