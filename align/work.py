"""What a stage works with, and how its result is written, read back and compared before it counts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file

from align.chain import Footing, adapter_name, options_of
from align.checkpoint import FORMAT_VERSION, Checkpoint, Parent
from align.config import RunConfig, StageSpec
from align.disk import write_record
from align.dressing import TEMPLATE, bare
from align.fingerprint import read_model_config
from align.packing import pack
from align.reading import Reading, context_of
from align.resume import Keeper
from align.roles import Bases, Role
from align.tracking import Metrics
from data_prep.errors import TrainingStopped, UserError
from data_prep.prepare import Prepared, Renderer

PROBE_ATOL = 1e-4  # across machines; within a process the comparison is exact


@dataclass
class Work:
    """Everything a stage may use. One is made per stage; nothing in it outlives the stage."""

    config: RunConfig
    spec: StageSpec
    accelerator: Accelerator
    bases: Bases
    renderer: Renderer
    footing: Footing
    init: Checkpoint | None
    reward: Checkpoint | None
    staging: Path
    """Folder the stage writes into; published under the stage's name when the stage is done."""
    metrics: Metrics
    inputs_digest: str
    keeper: Keeper
    numbers: dict[str, Any] = field(default_factory=dict)
    """What the stage wants in run.json: trainable, total, metrics."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds by phase, for run.json; not in metrics.jsonl, which equal runs write equally."""

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def lr(self) -> float:
        """The stage's peak learning rate: as set, else its default for this adapter and model."""
        return float(self.spec.stage.peak_lr(self.spec.adapter, self.config.model.lr_scale))

    @property
    def context(self) -> int | None:
        """Longest row in tokens that the model takes behind the virtual tokens of its roles, if it has a limit."""
        return context_of(read_model_config(self.bases.folder), self.spec.adapter, (self.init, self.reward))

    def rows(self, kind: str) -> Prepared[Any]:
        """The stage's rows of one kind of data as token ids, within the model's context.

        Raises:
            UserError: bad rows, too many that are too long, or too few that are left.
        """
        config = read_model_config(self.bases.folder)
        prepared = Reading(self.spec, self.renderer, config, self.context, self.seed).rows(kind)
        self.spec.stage.check_rows(f"stages.{self.spec.name}", len(prepared.train))
        return prepared

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time spent inside towards a phase of the stage."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.monotonic() - started

    def fresh_role(self, name: str) -> Role:
        """The stage's trainable role on its parent, with deterministic initial adapter weights."""
        torch.manual_seed(self.seed)
        return self.bases.fresh(self.init, self.spec.adapter, self.footing, name)

    def start_role(self, name: str) -> Role:
        """The frozen function that the stage's fresh role starts from."""
        if self.footing.mode is None and not self.spec.adapter.traits.starts_as_parent:
            return self.fresh_role(name).freeze()
        return self.bases.start_of(self.init, self.footing, name)

    def write_card(self, prepared: Prepared[Any]) -> None:
        """Keep the data card beside the result."""
        if self.is_main:
            (self.staging / "data_card.json").write_text(
                json.dumps(prepared.card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )


def write_samples(work: Work, rows: Sequence[dict[str, Any]]) -> None:
    """Keep some inputs and outputs of the stage in samples.jsonl, to be read by people."""
    if work.is_main:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (work.staging / "samples.jsonl").write_text("".join(lines), encoding="utf-8")


@dataclass
class Result:
    """What a stage hands over to be saved."""

    role: Role
    kind: str
    """policy, reward or value."""
    parents: Sequence[tuple[str, Checkpoint]]
    """(role, checkpoint) of everything it stands on (`init`) or was trained against."""
    probe_ids: Sequence[Sequence[int]]
    metrics: dict[str, Any]
    on_parent: str | None
    reward_norm: dict[str, float] | None = None


def save_result(work: Work, result: Result, folder: Path) -> Checkpoint:
    """Write a checkpoint into `folder`, open it again from disk and compare its outputs bit by bit.

    Raises:
        TrainingStopped: what was read back does not give the outputs of what was trained.
    """
    with work.phase("save"):
        return _save_and_compare(work, result, folder)


def _save_and_compare(work: Work, result: Result, folder: Path) -> Checkpoint:
    role = result.role
    role.eval()
    probe = outputs(role, result.probe_ids)
    if work.is_main:
        try:
            _write(work, result, folder, probe)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot write the checkpoint ({error})",
                code="cannot_write",
                file=str(folder),
                hint="make room, then the same command goes on after the last finished stage",
            ) from error
    work.accelerator.wait_for_everyone()
    saved = Checkpoint.open(folder)
    saved.check_files()
    again = outputs(work.bases.realise(saved, "saved", work.footing.load), result.probe_ids)
    if again != probe:
        gap = max(abs(a - b) for x, y in zip(again, probe, strict=True) for a, b in zip(x, y, strict=True))
        raise TrainingStopped(
            f"{saved.stage}: the saved checkpoint does not reproduce what was trained (outputs differ by {gap:.2e})",
            code="save_mismatch",
        )
    return saved


@torch.no_grad()
def outputs(role: Role, probe_ids: Sequence[Sequence[int]]) -> list[list[float]]:
    """A role's outputs on probe sequences: the score of each, or the log-probability of each of its tokens."""
    from align.objectives import chosen_logprobs

    result = []
    for ids in probe_ids:
        packed = pack([list(ids)]).to(role.tree.device)
        if role.head is not None:
            result.append(role.scores(packed, torch.tensor([len(ids) - 1], device=role.tree.device)).tolist())
        else:
            hidden = role.hidden(packed)[:-1]
            result.append(chosen_logprobs(role, hidden, packed.ids_1N[0, 1:]).tolist())
    return result


def _write(work: Work, result: Result, folder: Path, probe: list[list[float]]) -> None:
    role, adapter = result.role, result.role.adapter
    assert adapter is not None
    folder.mkdir(parents=True, exist_ok=True)
    adapter.save(role.carrier, folder)
    names = list(adapter.files())
    if adapter.traits.owns_weights:
        names += _copied(work, folder, ("tokenizer.json", "tokenizer_config.json", TEMPLATE, "special_tokens_map.json"))
    elif bare(work.bases.folder) != work.bases.folder:
        names += _copied(work, folder, (TEMPLATE,))
    if role.head is not None:
        save_file({k: v.contiguous() for k, v in role.head.state_dict().items()}, folder / "head.safetensors")
        names.append("head.safetensors")
    (folder / "README.md").write_text(_card(work, result), encoding="utf-8")
    write_record(folder, _record(work, result, folder, probe), names)


def _record(work: Work, result: Result, folder: Path, probe: list[list[float]]) -> dict[str, Any]:
    role, adapter = result.role, result.role.adapter
    assert adapter is not None
    init = next((checkpoint for name, checkpoint in result.parents if name == "init"), None)
    base = work.bases.identity if init is None else work.bases.standing_on(init, work.footing)
    return {
        "format_version": FORMAT_VERSION,
        "stage": work.spec.name if result.kind != "value" else "value",
        "method": adapter_name(adapter),
        "options": options_of(adapter),
        "role": result.kind,
        "on_parent": result.on_parent,
        "root": work.bases.identity.id,
        "base": base.as_dict(),
        "derived_base": base.fingerprint != work.bases.identity.fingerprint,
        "load": work.footing.load.value,
        "parents": [_parent(folder, name, checkpoint).as_dict() for name, checkpoint in result.parents],
        "tokenizer_digest": work.renderer.tokenizer_digest,
        "template_digest": work.renderer.template_digest,
        "head": {"kind": "scalar", "shape": list(role.head.score.weight.shape)} if role.head is not None else None,
        "reward_norm": result.reward_norm,
        "probe": {"input_ids": [list(ids) for ids in result.probe_ids], "expected": probe, "atol": PROBE_ATOL},
        "metrics": result.metrics,
        "forced": list(work.footing.forced),
        "inputs_digest": work.inputs_digest,
        "seed": work.seed,
    }


def _parent(folder: Path, role: str, checkpoint: Checkpoint) -> Parent:
    """Parents in the same run or sweep are recorded relative to the checkpoint, others by their full path."""
    import os

    run, other = folder.resolve().parent, checkpoint.folder.resolve()
    sweep = next((place for place in run.parents if (place / "sweep.json").is_file()), run.parent)
    inside = any(place in other.parents for place in (run, run.parent, sweep))
    path = os.path.relpath(other, folder.resolve()) if inside else str(other)
    return Parent(role, path, checkpoint.digest)


def _copied(work: Work, folder: Path, wanted: Sequence[str]) -> list[str]:
    """Take files of the base along: a whole model's tokenizer, or the chat template that the base got in this run."""
    import shutil

    names = [name for name in wanted if (work.bases.folder / name).is_file()]
    for name in names:
        shutil.copyfile(work.bases.folder / name, folder / name)
    return names


def _card(work: Work, result: Result) -> str:
    """The model card: what this checkpoint is and how it was made."""
    adapter = result.role.adapter
    assert adapter is not None
    lines = [
        "---",
        f"base_model: {work.bases.identity.id}",
        "library_name: " + ("transformers" if adapter.traits.owns_weights else "peft"),
        "tags: [align]",
        "---",
        f"# {work.spec.name} ({adapter_name(adapter)})",
        "",
        f"Stage `{work.spec.name}` of pipeline `{work.config.pipeline}`, role `{result.kind}`, "
        f"base loaded as `{work.footing.load.value}`.",
        "",
        "Stands on: " + (", ".join(f"{name} `{c.label}`" for name, c in result.parents) or "the base alone") + ".",
        "",
        "Made by `" + " ".join(work.config.command) + "`; `checkpoint.json` holds lineage, hashes and probe.",
        "",
        "| metric | value |",
        "|---|---|",
        *(f"| {name} | {value:.6g} |" for name, value in result.metrics.items() if isinstance(value, int | float)),
        "",
    ]
    return "\n".join(lines)
