"""Options of the verbs that turn checkpoints into other forms. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from align.config.schema import Load
from align.inference.forms import Form
from data_prep.core.errors import UserError
from data_prep.core.options import option


class How(Enum):
    """How `align combine` puts adapters together."""

    linear = "linear"
    svd = "svd"
    ties = "ties"
    dare_linear = "dare_linear"
    dare_ties = "dare_ties"


@dataclass
class OutOptions:
    """What every one of these verbs takes."""

    to: str | None = option(None, "folder to write; must not exist yet (default: RUN/export/STAGE-FORM)")
    out: str = option("runs", "folder of runs, in which RUN and RUN/STAGE are looked up")
    base: str | None = option(None, "folder of the base where it lies now (default: as the checkpoint records)")


@dataclass
class MergeOptions(OutOptions):
    """Options of `align merge`."""

    load: Load = option(Load.fp32, "precision of the merged weights: fp32|bf16")
    max_kl: float | None = option(
        None,
        "largest KL in nats per token between what was trained and what is written (default: 1e-5, with bf16 2e-2)",
    )
    features: Any = option(None, "features of every row, for a method that reads them: pirate, or [0.5,1]")


@dataclass
class ExportOptions(MergeOptions):
    """Options of `align export`."""

    form: Form | None = option(
        None, "peft|lora|merged|sequence_classification (default: what the checkpoint can be without loss)"
    )


class To(Enum):
    """Where `align ship` brings a checkpoint."""

    folder = "folder"
    vllm = "vllm"
    gguf = "gguf"
    ollama = "ollama"
    hub = "hub"


GGUF = (To.gguf, To.ollama)
"""Destinations that are written as a GGUF file."""


class Precision(Enum):
    """Precision of the weights that `align ship` writes."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


@dataclass
class ShipOptions:
    """Options of `align ship`."""

    to: To | None = option(None, "folder|vllm|gguf|ollama|hub: what shall load it")
    folder: str | None = option(None, "folder to write; must not exist yet (default: RUN/export/STAGE-TO)")
    adapter: bool = option(False, "folder, hub: the adapter alone, for peft on the base")
    load: Precision = option(Precision.fp32, "precision of merged weights: fp32|bf16; gguf, ollama: fp32|fp16")
    max_kl: float | None = option(
        None,
        "largest KL in nats per token between what was trained and what is written (default: 1e-5, in 16 bits 2e-2)",
    )
    system: str | None = option(None, "ollama: system prompt of talks that have none (default: data.system of the run)")
    repo: str | None = option(None, "hub: the repository, OWNER/NAME (default: RUN-STAGE of whoever is logged in)")
    push: bool = option(False, "hub: upload; without it, only say what would be uploaded")
    private: bool = option(True, "hub: a repository that is made is private")
    features: Any = option(None, "features of every row, for a method that reads them: pirate, or [0.5,1]")
    out: str = option("runs", "folder of runs, in which RUN and RUN/STAGE are looked up")
    base: str | None = option(None, "folder of the base where it lies now (default: as the checkpoint records)")


@dataclass
class RankOptions(OutOptions):
    """What stays of a change: one of rank and energy."""

    rank: int | None = option(None, "rank of every layer", low=1)
    energy: float | None = option(None, "share of each layer's squared norm to keep", above=0, high=1)


@dataclass
class ExtractOptions(RankOptions):
    """Options of `align extract`."""

    base: str | None = option(
        None, "folder of the base that TARGET was tuned from, for a plain model (default: as the checkpoint records)"
    )


@dataclass
class CombineOptions(OutOptions):
    """Options of `align combine`."""

    how: How = option(How.linear, "linear|svd|ties|dare_linear|dare_ties")
    weights: list[float] = field(
        default_factory=list,
        metadata={"help": "one weight for each TARGET: [0.7,0.3] (default: 1 where signs are elected, else 1/n)"},
    )
    rank: int | None = option(None, "rank to cut the combination to; linear alone needs none", low=1)
    density: float | None = option(
        None, "ties and dare: share of the entries that stay (default: 0.5)", above=0, high=1
    )
    seed: int = option(0, "dare: seed of the dropping")
    rows: int = option(200, "held-out rows of each task to measure on", low=1)


@dataclass
class CompressOptions(RankOptions):
    """Options of `align compress`."""

    max_kl: float = option(
        2e-2,
        "largest KL in nats per token between the checkpoint and what is written; --force goes past it",
        low=0,
        high=math.inf,
    )


def kept_of(options: RankOptions) -> tuple[int | None, float | None]:
    """(rank, energy), of which exactly one is given."""
    if (options.rank is None) == (options.energy is None):
        raise UserError("give either rank=N or energy=SHARE", code="bad_value")
    return options.rank, options.energy


def named(to: str | None, checkpoint: Path, form: str) -> Path:
    """The folder that a form of a checkpoint goes to: the one asked for, else one beside the checkpoint."""
    return Path(to).expanduser() if to else checkpoint.parent / "export" / f"{checkpoint.name}-{form}"


def place(to: str | None, checkpoint: Path, form: str, key: str = "to") -> Path:
    """The folder to write, which the option `key` names; one that exists is never written into."""
    folder, hint = named(to, checkpoint, form), f"give another folder: {key}=DIR"
    if folder.exists():
        raise UserError("exists already", file=str(folder), hint=hint, code="exists")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UserError("is a file, and no folder to write into", file=str(above), hint=hint)
    return folder
