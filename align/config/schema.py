"""What can be set at the top of a run: dataclasses that Hydra shows and checks.

The options of stages, adapters and data live beside what they set: `align/stages/`, `align/adapters/`,
`data_prep/options.py`. This file has the rest: the base model, and the run itself.
"""

# No `from __future__ import annotations`: OmegaConf reads these annotations as types.
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from data_prep.core.options import option
from data_prep.options import DataOptions


def spelled(weights: str, double_quant: bool = True, compute: Optional[str] = None) -> str:
    """How recipes and records spell a precision."""
    return "_".join([weights, *([] if double_quant else ["single"]), *([compute] if compute else [])])


class Load(Enum):
    """Precision at which a base's weights are kept in memory: their number type, and in 4 bits two things more.

    Recipes and records spell it from its parts, as nf4_single_bf16.
    """

    fp32 = "fp32"
    bf16 = "bf16"
    nf4 = "nf4"
    nf4_fp32 = "nf4", True, "fp32"
    nf4_bf16 = "nf4", True, "bf16"
    nf4_single = "nf4", False
    nf4_single_fp32 = "nf4", False, "fp32"
    nf4_single_bf16 = "nf4", False, "bf16"
    fp4 = "fp4"
    fp4_fp32 = "fp4", True, "fp32"
    fp4_bf16 = "fp4", True, "bf16"
    fp4_single = "fp4", False
    fp4_single_fp32 = "fp4", False, "fp32"
    fp4_single_bf16 = "fp4", False, "bf16"

    weights: str
    """fp32, bf16, nf4 or fp4."""
    double_quant: bool
    """In 4 bits: whether the scales of its blocks are quantised too."""
    compute: Optional[str]
    """In 4 bits: what products are taken in; None: what suits the device."""

    def __new__(cls, weights: str, double_quant: bool = True, compute: Optional[str] = None) -> "Load":
        """A member, the value of which is its spelling."""
        member = object.__new__(cls)
        member._value_ = spelled(weights, double_quant, compute)
        member.weights, member.double_quant, member.compute = weights, double_quant, compute
        return member

    @property
    def four_bit(self) -> bool:
        """Whether weights are kept in 4 bits."""
        return self.weights in ("nf4", "fp4")

    def computes_in(self, device: str) -> str:
        """fp32 or bf16: what matrix products are taken in on a device type, autocast aside.

        4-bit weights without a named one: bf16 on GPUs, fp32 on CPUs.
        """
        if not self.four_bit:
            return self.weights
        return self.compute or ("bf16" if device == "cuda" else "fp32")


class OnPrecisionChange(Enum):
    """What to do when a stage would load the base at another precision than its parent did."""

    refuse = "refuse"
    recalibrate = "recalibrate"


class RewardGate(Enum):
    """What PPO does about the verdict on its reward model (`reward/gate.py`)."""

    off = "off"
    warn = "warn"
    strict = "strict"


class Shard(Enum):
    """What several processes have parts of."""

    none = "none"
    base = "base"
    full = "full"


class Decode(Enum):
    """How replies are written by a base that is cut."""

    whole = "whole"
    layers = "layers"


class TrackingMode(Enum):
    """Whether trackers may send anything away from this machine."""

    offline = "offline"
    online = "online"


def _map(text: str) -> Any:
    return field(default_factory=dict, metadata={"help": text})


def _list(text: str) -> Any:
    return field(default_factory=list, metadata={"help": text})


@dataclass
class ModelOptions:
    """The base model: a folder, a hub id, the embedded one, or a fresh one built from a configuration."""

    name: str = option("hf", "name of the base, for cards and reports")
    path: Optional[str] = option(None, "folder or hub id org/name; package:nano is the embedded base")
    revision: Optional[str] = option(None, "branch, tag or commit of a hub id")
    template: Optional[str] = option(
        None, "chatml|plain|PATH: chat template for a model without one (or instead of its own)"
    )
    aliases: list[str] = _list("other names of these weights, as plain peft adapters may name their base [a,b]")
    load: Optional[Load] = option(None, "fp32|bf16|nf4 (default: as the parent was trained, else fp32)")
    init: Optional[str] = option(None, "random: build fresh weights from `config` instead of loading any")
    config: dict[str, Any] = _map("with init=random: the fields of the model's config.json")
    tokenizer: dict[str, Any] = _map("with init=random: vocab_size and template of the tokenizer to train")
    lr_scale: float = option(1.0, "factor on learning rates that are not set; small models take larger ones")
    plain: bool = option(False, "compute with the libraries' own modules alone, not with this project's faster ones")
    trust_remote_code: bool = option(False, "never true in this toolkit's own recipes; code from a hub stays off")


@dataclass
class TrackingOptions:
    """Where a run's numbers also go, beside metrics.jsonl; none of this changes a result or a run's name."""

    to: list[str] = _list("trackers: [wandb,tensorboard,trackio]; none by default")
    project: str = option("align", "project that the run belongs to")
    entity: Optional[str] = option(None, "wandb: user or team that owns the project")
    group: Optional[str] = option(None, "group of runs; a sweep's jobs are in the sweep's group")
    tags: list[str] = _list("tags of the run [a,b]")
    mode: Optional[TrackingMode] = option(
        None, "offline: nothing leaves this machine; online (default: WANDB_MODE for wandb, else offline)"
    )
    weights: bool = option(True, "wandb: whether weight files go along with checkpoints")
    wait: float = option(30.0, "seconds to wait at the end for trackers to finish")


@dataclass
class DistributedOptions:
    """How the processes of a run share its memory; none of this changes what is computed, or a run's name."""

    shard: Shard = option(
        Shard.none,
        "none (each process has the whole base)|base (a part of every layer; adapters and heads whole)|full (as base, "
        "and parts of the weights that full and feature_extraction train, with their gradients and moments)",
    )
    decode: Decode = option(
        Decode.whole,
        "with parts, while replies are written: whole (the model is put together)|layers (only a layer at a time)",
    )


@dataclass
class RunOptions:
    """Every top-level key of a recipe; `config.yaml` fills it and overrides change it."""

    model: ModelOptions = field(default_factory=ModelOptions, metadata={"help": "the base model"})
    adapter: Any = option(None, "adapter of every stage that has none of its own")
    data: DataOptions = field(default_factory=DataOptions, metadata={"help": "data of every stage"})
    stages: dict[str, Any] = _map("the stages of the pipeline, in order; stages.NAME.OPTION=VALUE changes one")
    seed: int = option(0, "seed of every random choice")
    out: str = option("runs", "folder that run folders are made in")
    name: Optional[str] = option(None, "name of the run folder (default: the pipeline and the config's digest)")
    tracking: TrackingOptions = field(default_factory=TrackingOptions, metadata={"help": "trackers of the run"})
    distributed: DistributedOptions = field(default_factory=DistributedOptions, metadata={"help": "several processes"})
    on_precision_change: OnPrecisionChange = option(
        OnPrecisionChange.refuse, "refuse|recalibrate: a parent trained at another precision than this stage's"
    )
    reward_gate: RewardGate = option(
        RewardGate.warn, "off|warn|strict: what ppo does where the gate of its reward model says refuse; strict stops"
    )
    allow_code: bool = option(False, "whether functions of your own may score replies: {python: PACKAGE.FUNCTION}")
    deterministic: bool = option(
        False, "true: the same bits each time on one GPU too, by slower kernels (one CPU gives them anyway)"
    )


@dataclass(frozen=True)
class StageSpec:
    """One stage of a run with everything it needs."""

    name: str
    stage: Any
    """An instance of a registered stage's dataclass."""
    adapter: Any
    """An instance of a registered adapter's dataclass."""
    data: DataOptions


@dataclass(frozen=True)
class RunConfig:
    """A whole run, checked. `resolved` is the same as plain data, complete: what `recipe.yaml` holds."""

    pipeline: str
    seed: int
    out: str
    name: str
    model: ModelOptions
    tracking: TrackingOptions
    distributed: DistributedOptions
    on_precision_change: OnPrecisionChange
    reward_gate: RewardGate
    allow_code: bool
    deterministic: bool
    stages: list[StageSpec]
    resolved: dict[str, Any]
    digest: str
    """SHA-256 of `resolved` without `NOT_IN_DIGEST`."""
    command: list[str]
    swept: dict[str, str] = field(default_factory=dict)
    """What the recipe is made to be swept over, key -> values; one run has the recipe's own values."""
    repeats: dict[str, str] = field(default_factory=dict)
    """Stages that options have asked for -> the stage of which each repeats the options."""

    @property
    def model_names(self) -> list[str]:
        """What the model is called, by this run and elsewhere."""
        return [name for name in (self.model.path, *self.model.aliases) if name]


# How a stage stands on its parent: `continue` is a Python keyword, hence the functional form.
OnParent = Enum("OnParent", ["auto", "continue", "stack", "merge"])
