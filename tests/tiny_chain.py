"""Tiny runs on tiny models: what the tests of stages, chains and tampering share. CPU only, offline, temp folders."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Container, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from align.adapters.base import Adapter
from align.checkpoints.checkpoint import Checkpoint
from align.checkpoints.compatibility import ParentMode, choose_parent_mode
from align.config.compose import compose
from align.config.registries import adapters, stages
from align.config.schema import Load, OnParent, OnPrecisionChange, RunConfig
from align.models.fingerprint import base_fingerprint
from align.models.packing import pack
from align.models.shared_base import BaseIdentity, SharedBase
from align.roles import Bases, Role
from align.stages import supervised
from data_prep.core.errors import UserError
from data_prep.types import FeaturedIds
from tests.tiny import save_tiny_llama, write_jsonl

_KEPT = tempfile.TemporaryDirectory(prefix="align-tests-")
HOME = Path(_KEPT.name)
"""Made once per process, removed at its end."""
os.environ.update(ALIGN_CACHE=str(HOME / "cache"), HF_HUB_OFFLINE="1")
os.environ["CUDA_VISIBLE_DEVICES"] = (
    ""  # with or without a graphics card, the tests see the machine they are written for
)
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

os.fsync = lambda handle: None  # runs of seconds need not outlive a power cut; waiting for the disk is a tenth of one
supervised.SAMPLED = 8  # a tiny model says nothing in more of them; decoding 64 takes longer than training

WORDS = [
    "the",
    "and",
    "you",
    "all",
    "thy",
    "ant",
    "oat",
    "owl",
    "lion",
    "hall",
    "tall",
    "band",
    "land",
    "sand",
    "yell",
    "bell",
    "than",
    "then",
    "thee",
    "youth",
]
CPU = torch.device("cpu")
PRECISIONS = (Load.fp32, Load.bf16, Load.nf4)
"""Those that the contract tests go through; tests/align/models/test_four_bit.py has the other 4-bit ones."""
FEW = {
    "max_steps": "2",
    "updates": "2",
    "minibatches": "2",
    "batch_size": "8",
    "max_new_tokens": "6",
    "critic_warmup": "1",
    "prompts": "6",
    "max_length": "96",
}
"""Options that make a stage short; a stage takes those that it has."""


@cache
def base(seed: int = 0) -> Path:
    """A tiny Llama; never to be changed in place (copy it)."""
    return save_tiny_llama(HOME / f"base-{seed}", seed=seed)


@cache
def rows_folder() -> Path:
    """conversations.jsonl, preferences.jsonl and text.jsonl: 40 rows each, of unequal lengths, with a number each."""
    folder = HOME / "rows"
    pairs = []
    for i in range(40):
        word, other = WORDS[i % 20], WORDS[(7 * i + 3) % 20]
        asked = " ".join(["say", word] + [other] * (i % 4)) + f" {i}"
        better, worse = " ".join([word] * (1 + i % 3)), f"no {other}" * (1 + i % 2)
        pairs.append({"prompt": asked, "chosen": better, "rejected": worse, "features": [0.5 * (i % 4) - 0.5]})
    talk = [
        {
            "messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}],
            "features": row["features"],
        }
        for row in pairs
    ]
    for row in talk[::5]:
        row["messages"] += [{"role": "user", "content": "more"}, {"role": "assistant", "content": "the end"}]
    write_jsonl(folder / "preferences.jsonl", pairs)
    write_jsonl(folder / "conversations.jsonl", talk)
    texts = [{"text": f"{row['prompt']}: {row['chosen']}", "features": row["features"]} for row in pairs]
    write_jsonl(folder / "text.jsonl", texts)
    return folder


def data_words(folder: Path | None = None) -> list[str]:
    """Overrides that name the rows of `folder` (default: `rows_folder()`), a fifth of them held out."""
    folder = folder or rows_folder()
    words = ["data=files"]
    for kind in ("conversations", "preferences", "text"):
        words += [f"data.{kind}.path={folder / kind}.jsonl", f"data.{kind}.eval_share=0.2"]
    return words


def few(**names: type) -> list[str]:
    """Overrides that make stages short; NAME=its dataclass."""
    return [
        f"stages.{name}.{option}={value}"
        for name, cls in names.items()
        for option, value in FEW.items()
        if option in cls.__dataclass_fields__  # type: ignore[attr-defined]
    ]


@cache
def parts_of(pipeline: str) -> tuple[str, ...]:
    """The stages of a pipeline, which here are named as what they are."""
    return tuple(spec.name for spec in compose([f"pipeline={pipeline}"]).stages)


def pipeline_words(pipeline: str, *more: str, model: Path | None = None) -> list[str]:
    """A short run of a pipeline on the tiny base and rows."""
    short = few(**{name: stages.get(name) for name in parts_of(pipeline)})  # type: ignore[arg-type]
    return [f"pipeline={pipeline}", "model=hf", f"model.path={model or base()}", *data_words(), *short, *more]


def made(pipeline: str, *more: str, out: Path | None = None, model: Path | None = None, without: str = "") -> Path:
    """Run a short pipeline, one of its stages left out if need be; returns its run folder."""
    config = compose([*pipeline_words(pipeline, *more, model=model), f"out={out or HOME / 'runs'}"])
    config = replace(config, stages=[spec for spec in config.stages if spec.name != without])
    execute(config)
    return Path(config.out) / config.name


def execute(config: RunConfig) -> dict[str, Any]:
    """`align.pipeline.run`."""
    from align import pipeline

    return pipeline.run(config)


@cache
def finished(*more: str) -> Path:
    """The run folder of a whole chain; shared between tests, never to be changed in place (`copied`)."""
    return made("rlhf", *more)


def copied(run: Path, out: Path) -> Path:
    """A copy of a run folder below `out`, under its own name."""
    return Path(shutil.copytree(run, out / run.name))


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def bases(folder: Path | None = None) -> Bases:
    """Bases over a model folder, nothing loaded yet."""
    folder = folder or base()
    return Bases(folder, BaseIdentity("tiny", None, base_fingerprint(folder)), CPU)


def legal_loads(cls: type[Adapter]) -> list[Load]:
    """Precisions of the base that a method can stand on, by the project's own rule."""
    legal = []
    for load in PRECISIONS:
        with suppress(UserError):
            found = choose_parent_mode(None, cls(), OnParent.auto, load, OnPrecisionChange.refuse).load
            legal += [load] if found is load else []
    return legal


def methods_and_loads() -> list[tuple[str, Load]]:
    """Every registered method at every precision it allows."""
    return [(name, load) for name, cls in adapters.items() for load in legal_loads(cls)]  # type: ignore[arg-type]


def grid_beyond(cases: Iterable[Any], kept: Container[Any]) -> list[Any]:
    """Cases as pytest parameters; those that are not in `kept` are for the grid."""
    import pytest

    return [pytest.param(case, marks=[] if case in kept else [pytest.mark.grid]) for case in cases]


def covered(cases: list[tuple[str, Load]], turn: int = 0) -> list[Any]:
    """Cases as pytest parameters: of each method one precision, in turn; the rest is for the grid.

    Tests that take other turns cover each two of (test, method, precision) together.
    """
    import pytest

    found = []
    for number, method in enumerate(dict.fromkeys(method for method, _ in cases)):
        loads = [load for name, load in cases if name == method]
        for load in loads:
            marks = [] if load is loads[(number + turn) % len(loads)] else [pytest.mark.grid]
            found.append(pytest.param(method, load, marks=marks, id=f"{method}-{load.value}"))
    return found


def fresh(method: str, load: Load, found: Bases | None = None, seed: int = 0, **options: Any) -> Role:
    """A trainable role of a method on the bare base, stirred so that it computes something of its own."""
    adapter: Any = adapters.get(method)
    torch.manual_seed(seed)
    role = (found or bases()).fresh(None, adapter(**options), ParentMode(None, load), "policy")
    return stirred(role, seed)


def stirred(role: Role, seed: int = 0, size: float = 0.05) -> Role:
    """Move every trainable tensor a little, as training would."""
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for parameter in role.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * size
                parameter.add_(noise.to(parameter.dtype))
    return role


@torch.no_grad()
def logits(role: Role, sequences: list[list[int]] | None = None) -> torch.Tensor:
    """Logits [N, V] of packed sequences, dropout off; the role's mode is put back."""
    training = role.training
    role.eval()
    found = role.logits(role.hidden(pack(sequences or sentences())))
    role.train(training)
    return found.float()


def sentences(count: int = 5, seed: int = 0, longest: int = 14) -> list[list[int]]:
    """Sequences of token ids of unequal lengths, each with a number as its features, for methods that read them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [3 + (5 * i) % (longest - 2) for i in range(count)]
    ids = [torch.randint(5, 260, (n,), generator=generator).tolist() for n in lengths]
    return [FeaturedIds(row, (0.5 * (place % 4) - 0.5,)) for place, row in enumerate(ids)]


def shared_bytes(found: SharedBase) -> dict[str, bytes]:
    """Every tensor of a base by name, as bytes."""
    return {
        name: tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in found.model.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor) and tensor.numel()
    }


def checkpoint(run: Path, stage: str) -> Checkpoint:
    """A stage's checkpoint."""
    return Checkpoint.open(run / stage)


def refused(code: int, err: str) -> str:
    """The one line of a refusal: exit code 2, no traceback, exactly one line that begins with `align:`."""
    lines = [line for line in err.splitlines() if line.startswith("align:")]
    assert code == 2, err
    assert len(lines) == 1 and "Traceback" not in err, err
    assert err.rstrip().splitlines()[-1] == lines[0], err
    return lines[0]


def run(capfd: Any, *words: str) -> tuple[int, str]:
    """(exit code, standard error) of `align run`."""
    from align.cli.dispatch import main

    capfd.readouterr()
    code = main(["run", *words])
    return code, capfd.readouterr().err


def sft(tmp_path: Path, *more: str, model: Path | None = None) -> list[str]:
    """Overrides of a short SFT run into `tmp_path`/n."""
    return [*pipeline_words("sft", "name=n", *more, model=model), f"out={tmp_path}"]


def talk(count: int = 24, question: str = "say {i}", answer: str = "the {i}") -> list[dict[str, Any]]:
    """Conversations of one turn."""
    return [
        {
            "messages": [
                {"role": "user", "content": question.format(i=i)},
                {"role": "assistant", "content": answer.format(i=i)},
            ]
        }
        for i in range(count)
    ]


def own_data(path: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Overrides that make a run read these rows alone."""
    return [f"data.conversations.path={write_jsonl(path, rows)}"]


def until(condition: Callable[[], Any], seconds: float = 240.0) -> Any:
    """Wait for a condition; the limit only catches a hang."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return found
