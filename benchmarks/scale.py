"""Memory and traffic of each process under `distributed.shard`, in closed form, for the tables of docs/scale.md.

Nothing is measured: sizes are read off the architecture on the meta device, and what is sent follows from them.
`tests/align/models/test_sharding.py` holds the closed forms against what two processes hold and send.

    python benchmarks/scale.py             print the tables
    python benchmarks/scale.py --document  write them into docs/scale.md
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pages import write_measured

from align.adapters.lora import Lora
from align.adapters.shapes import meta_model
from align.models.sharding import layers_of

GB = 1e9
PROCESSES = (1, 8, 64, 512)
WEIGHT = {"fp32": 4.0, "bf16": 2.0, "nf4": 0.5}
"""Bytes of a weight that is cut; in 4 bits the scales, 0.016 bytes a weight, stay whole."""
SCALES = 0.127 / 8
RANK = 16
ADAM = 16
"""Bytes of a trained number in float32: itself, its gradient and two moments."""
TOKENS = 8192
"""Of a pass."""
LINKS = {"NVLink, 400 GB/s": 400e9, "network, 50 GB/s": 50e9}
SPEED = 400e12
"""Operations a second of one GPU in bf16."""
PAGE = Path(__file__).resolve().parent.parent / "docs" / "scale.md"


def llama(width: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    """config.json of a Llama 3.1."""
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    }


MODELS = {"8B": llama(4096, 14336, 32, 32), "70B": llama(8192, 28672, 80, 64)}


@dataclass(frozen=True)
class Base:
    """Weights of a base by what becomes of them."""

    cut: int
    """In the layers' matrices."""
    whole: int
    """Embeddings, output head, norms and biases."""
    layers: int
    width: int

    @classmethod
    def of(cls, model_config: dict[str, Any]) -> Base:
        """The base that a config.json describes."""
        model: Any = meta_model(model_config)
        layers = layers_of(model)
        cut = sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() > 1)
        return cls(cut, sum(p.numel() for p in model.parameters()) - cut, len(layers), model.config.hidden_size)

    def held(self, load: str, processes: int) -> float:
        """Bytes of the base that each process keeps."""
        scales = SCALES * self.cut if load == "nf4" else 0.0
        whole = self.whole * (2.0 if load == "nf4" else WEIGHT[load])
        return self.cut * WEIGHT[load] / processes + scales + whole

    def passing(self, load: str, processes: int) -> float:
        """Bytes beside those while layers are computed: one that is whole, and the next on its way."""
        return 0.0 if processes == 1 else 2 * self.cut / self.layers * WEIGHT[load]

    def trained(self, processes: int) -> float:
        """Bytes of all weights in parts, trained by AdamW in float32."""
        return (self.cut + self.whole) * ADAM / processes

    def whole_in_pass(self, processes: int) -> float:
        """Bytes beside those while they are computed: what lies outside the layers and its gradients, and layers."""
        gradients = 4.0 * self.cut / self.layers
        return 0.0 if processes == 1 else 8.0 * self.whole + self.passing("fp32", processes) + gradients

    def received(self, load: str, processes: int) -> float:
        """Bytes that reach a process so that every layer is whole once."""
        return self.cut * WEIGHT[load] * (processes - 1) / processes


def memory_rows(load: str) -> list[list[str]]:
    """A row for each model and number of processes."""
    rows = []
    for name, config in MODELS.items():
        base, trained = Base.of(config), Lora(rank=RANK).count(config).trainable
        for processes in PROCESSES:
            held, passing = base.held(load, processes), base.passing(load, processes)
            kept = TOKENS * base.width * base.layers * 2
            sft = held + passing + trained * ADAM + kept
            ppo = held + passing + trained * (2 * ADAM + 2 * 4) + 2 * kept
            numbers = (held, passing, trained * ADAM, kept, sft, ppo)
            rows.append([name, str(processes), *(f"{number / GB:.1f}" for number in numbers)])
    return rows


def full_rows() -> list[list[str]]:
    """A row for each model and number of processes, of SFT that trains all weights."""
    rows = []
    for name, config in MODELS.items():
        base = Base.of(config)
        for processes in PROCESSES:
            kept = TOKENS * base.width * base.layers * 2
            numbers = (base.held("fp32", processes), base.trained(processes), base.whole_in_pass(processes), kept)
            rows.append([name, str(processes), *(f"{number / GB:.1f}" for number in (*numbers, sum(numbers)))])
    return rows


def traffic_rows(load: str) -> list[list[str]]:
    """A row for each model and number of processes."""
    rows = []
    for name, config in MODELS.items():
        base, trained = Base.of(config), Lora(rank=RANK).count(config).trainable
        for processes in PROCESSES[1:]:
            once = base.received(load, processes)
            gradients = 2 * (processes - 1) / processes * trained * 4
            seconds = [f"{2 * once / link:.2f}" for link in LINKS.values()]
            computed = 4 * (base.cut + base.whole) * TOKENS / SPEED
            numbers = [f"{number / GB:.1f}" for number in (once, 2 * once, gradients)]
            rows.append([name, str(processes), *numbers, *seconds, f"{computed:.2f}"])
    return rows


def table(names: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def parts() -> dict[str, str]:
    """The measured parts of docs/scale.md by name."""
    memory = ["model", "GPUs", "base kept", "layers passing", "LoRA and AdamW", "inputs of layers", "SFT", "PPO"]
    traffic = ["model", "GPUs", "forward", "training pass", "gradients of a step", *LINKS, "computing"]
    full = ["model", "GPUs", "base kept", "trained", "whole in a pass", "inputs of layers", "SFT"]
    found = {f"memory {load}": table(memory, memory_rows(load)) for load in ("bf16", "nf4")}
    found["memory full"] = table(full, full_rows())
    return found | {f"traffic {load}": table(traffic, traffic_rows(load)) for load in ("bf16", "nf4")}


def main() -> None:
    """Print the tables, or write them into their page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document", action="store_true", help="write the tables into docs/scale.md")
    chosen = parser.parse_args()
    for name, part in parts().items():
        if chosen.document:
            write_measured(PAGE, name, part)
        else:
            print(f"{name}\n{part}")


if __name__ == "__main__":
    main()
