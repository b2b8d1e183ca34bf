"""What stands below a checkpoint or run: the chain as nodes and edges, its policies, its reward model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.checkpoints.checkpoint import RECORD, Checkpoint
from align.checkpoints.peft_adapter import UNKNOWN, is_foreign
from align.run_record import RunRecord, is_run


def lineage(folder: Path) -> dict[str, Any]:
    """Nodes (base and checkpoints) and edges (child stands on, or was trained against, parent) below `folder`.

    `folder` is a checkpoint folder or a run folder; a run gives the union over its stages.
    """
    if (folder / RECORD).is_file() or is_foreign(folder):
        tops = [Checkpoint.open(folder)]
    else:
        run = RunRecord.open(folder)
        tops = [Checkpoint.open(run.at(entry)) for entry in run.finished(RECORD)]
    found: dict[str, Checkpoint] = {}
    for top in tops:
        for checkpoint in (top, *top.ancestors()):
            found.setdefault(checkpoint.digest, checkpoint)
    nodes, edges = [], []
    bases: dict[str, dict[str, Any]] = {}
    for digest, checkpoint in found.items():
        record = checkpoint.record
        nodes.append(
            {
                "id": digest[:16],
                "digest": digest,
                "stage": checkpoint.stage,
                "role": record["role"],
                "method": checkpoint.method,
                "load": checkpoint.load,
                "on_parent": checkpoint.on_parent,
                "foreign": checkpoint.foreign,
                "path": str(checkpoint.folder),
                **({"labels": record["labels"]} if "labels" in record else {}),
            }
        )
        for parent in checkpoint.parents():
            edges.append({"from": digest[:16], "to": parent.digest[:16], "role": parent.role})
        for judge in checkpoint.judges:
            key = judge["fingerprint"]
            bases[key] = {"id": key[:16], "digest": key, "stage": judge["name"], "path": judge["path"]}
            edges.append({"from": digest[:16], "to": key[:16], "role": "reward"})
        if not any(parent.role == "init" for parent in checkpoint.parents()):
            fingerprint = record["base"]["fingerprint"] or UNKNOWN
            bases[fingerprint] = {
                "id": fingerprint[:16],
                "digest": fingerprint,
                "stage": "base",
                "path": record["root"],
            }
            edges.append({"from": digest[:16], "to": fingerprint[:16], "role": "base"})
    return {"nodes": [*nodes, *bases.values()], "edges": edges}


def chain_of(checkpoint: Checkpoint | None) -> list[tuple[str, Checkpoint | None]]:
    """The base and every policy from it to `checkpoint`, in order, named by stage."""
    chain: list[tuple[str, Checkpoint | None]] = []
    while checkpoint is not None:
        chain.append((checkpoint.stage, checkpoint))
        checkpoint = checkpoint.parent("init")
    chain.append(("base", None))
    chain.reverse()
    named: dict[str, Checkpoint | None] = {}
    for name, found in chain:
        number = 2
        unique = name
        while unique in named:
            unique, number = f"{name}-{number}", number + 1
        named[unique] = found
    return list(named.items())


def judge_of(checkpoint: Checkpoint) -> Checkpoint | None:
    """The reward model of a policy's chain: the one it or an ancestor was trained against, else its run's own."""
    for one in (checkpoint, *checkpoint.ancestors()):
        if (judge := one.parent("reward")) is not None:
            return judge
    folder = checkpoint.folder.resolve().parent
    if not is_run(folder):
        return None
    run = RunRecord.open(folder)
    made = [Checkpoint.open(run.at(entry)) for entry in run.finished(RECORD)]
    return next((one for one in reversed(made) if one.role == "reward"), None)
