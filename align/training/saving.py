"""What a stage works with, and how its result is written, read back and compared before it counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from align.checkpoints.card import write_card
from align.checkpoints.checkpoint import FORMAT_VERSION, Checkpoint, Parent, write_record
from align.checkpoints.compatibility import adapter_name, options_of
from align.models.chat_template import TEMPLATE, bare
from align.models.sharding import own_weights_whole
from align.roles import Role, outputs
from align.training.context import StageContext
from align.training.processes import as_one
from data_prep.core.errors import TrainingStopped, UserError
from data_prep.types import features_of

PROBE_ATOL = 1e-4
"""Across machines, and on a device, whose sums come in an order of their own; within a process of a CPU it is exact."""


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
    judges: Sequence[dict[str, str]] = ()
    """Stock models that rewarded it: name, path and fingerprint."""


def save_result(context: StageContext, result: Result, folder: Path) -> Checkpoint:
    """Write a checkpoint into `folder`, open it again from disk and compare its outputs bit by bit.

    Raises:
        TrainingStopped: what was read back does not give the outputs of what was trained.
    """
    with context.phase("save"):
        return _save_and_compare(context, result, folder)


def _save_and_compare(context: StageContext, result: Result, folder: Path) -> Checkpoint:
    role = result.role
    role.eval()
    probe = outputs(role, result.probe_ids)
    with own_weights_whole(role.tree, here=context.is_main), as_one(context.accelerator):
        if context.is_main:
            _write_or_say(context, result, folder, probe)
    saved = Checkpoint.open(folder)
    saved.check_files()
    again = outputs(context.bases.built(saved, "saved", context.parent_mode.load), result.probe_ids)
    if again != probe:
        gap = max(abs(a - b) for x, y in zip(again, probe, strict=True) for a, b in zip(x, y, strict=True))
        if context.accelerator.device.type == "cpu" or not gap <= PROBE_ATOL:
            raise TrainingStopped(
                f"{saved.stage}: the saved checkpoint does not give what was trained (outputs differ by {gap:.2e})",
                code="save_mismatch",
            )
    if context.is_main:
        write_card(saved, context.bases.folder, context.staging, " ".join(context.config.command))
    return saved


def _write_or_say(context: StageContext, result: Result, folder: Path, probe: list[list[float]]) -> None:
    try:
        _write(context, result, folder, probe)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the checkpoint ({error})",
            code="cannot_write",
            file=str(folder),
            hint="make room, then the same command goes on after the last finished stage",
        ) from error


def _write(context: StageContext, result: Result, folder: Path, probe: list[list[float]]) -> None:
    role, adapter = result.role, result.role.adapter
    assert adapter is not None
    folder.mkdir(parents=True, exist_ok=True)
    adapter.save(role.carrier, folder)
    names = list(adapter.files())
    if adapter.traits.owns_weights:
        names += _copied(
            context, folder, ("tokenizer.json", "tokenizer_config.json", TEMPLATE, "special_tokens_map.json")
        )
    elif bare(context.bases.folder) != context.bases.folder:
        names += _copied(context, folder, (TEMPLATE,))
    if role.head is not None:
        save_file({k: v.contiguous() for k, v in role.head.state_dict().items()}, folder / "head.safetensors")
        names.append("head.safetensors")
    write_record(folder, _record(context, result, folder, probe), names)


def _record(context: StageContext, result: Result, folder: Path, probe: list[list[float]]) -> dict[str, Any]:
    role, adapter = result.role, result.role.adapter
    assert adapter is not None
    init = next((checkpoint for name, checkpoint in result.parents if name == "init"), None)
    base = context.bases.identity if init is None else context.bases.standing_on(init, context.parent_mode)
    return {
        "format_version": FORMAT_VERSION,
        "stage": context.spec.name if result.kind != "value" else "value",
        "method": adapter_name(adapter),
        "options": options_of(adapter),
        "role": result.kind,
        "on_parent": result.on_parent,
        "root": context.bases.identity.id,
        "base": base.as_dict(),
        "derived_base": base.fingerprint != context.bases.identity.fingerprint,
        "load": context.parent_mode.load.value,
        "parents": [_parent(folder, name, checkpoint).as_dict() for name, checkpoint in result.parents],
        "tokenizer_digest": context.renderer.tokenizer_digest,
        "template_digest": context.renderer.template_digest,
        "head": {"kind": "scalar", "shape": list(role.head.score.weight.shape)} if role.head is not None else None,
        "reward_norm": result.reward_norm,
        **({"judges": list(result.judges)} if result.judges else {}),
        "probe": _probe(result.probe_ids, probe, adapter.traits.reads_features),
        "metrics": result.metrics,
        "forced": list(context.parent_mode.forced),
        **({"labels": context.labels} if context.labels else {}),
        "inputs_digest": context.inputs_digest,
        "seed": context.seed,
    }


def _probe(rows: Sequence[Sequence[int]], expected: list[list[float]], reads_features: bool) -> dict[str, Any]:
    """Rows, with their features where the method reads them, and what the checkpoint gives for them."""
    told = {"features": [features_of(row) for row in rows]} if reads_features else {}
    return {"input_ids": [list(ids) for ids in rows], **told, "expected": expected, "atol": PROBE_ATOL}


def _parent(folder: Path, role: str, checkpoint: Checkpoint) -> Parent:
    """Parents in the same run or sweep are recorded relative to the checkpoint, others by their full path."""
    import os

    run, other = folder.resolve().parent, checkpoint.folder.resolve()
    sweep = next((place for place in run.parents if (place / "sweep.json").is_file()), run.parent)
    inside = any(place in other.parents for place in (run, run.parent, sweep))
    path = os.path.relpath(other, folder.resolve()) if inside else str(other)
    return Parent(role, path, checkpoint.digest)


def _copied(context: StageContext, folder: Path, wanted: Sequence[str]) -> list[str]:
    """Take files of the base along: a whole model's tokenizer, or the chat template that the base got in this run."""
    import shutil

    names = [name for name in wanted if (context.bases.folder / name).is_file()]
    for name in names:
        shutil.copyfile(context.bases.folder / name, folder / name)
    return names
