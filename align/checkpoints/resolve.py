"""From what a user types (a path, RUN, RUN/STAGE) to a checkpoint or run folder."""

from __future__ import annotations

from pathlib import Path

from align.checkpoints.checkpoint import RECORD, Checkpoint, nearby_runs
from align.checkpoints.peft_adapter import is_foreign
from align.run_record import RunRecord, is_run
from data_prep.core.errors import UserError


def resolve_target(target: str, out: str) -> Path:
    """The checkpoint or run folder that TARGET names: a path, RUN, or RUN/STAGE below `out`."""
    for candidate in (Path(target).expanduser(), Path(out) / target):
        if (candidate / RECORD).is_file() or is_run(candidate):
            return candidate
        stage = _stage_folder(candidate.parent, candidate.name)
        if stage is not None:
            return stage
    places = " and ".join(dict.fromkeys([target, str(Path(out) / target)]))
    raise UserError(
        f"no run or checkpoint '{target}' (looked for {places})",
        code="unknown_target",
        hint=nearby_runs(Path(out) / target),
    )


def resolve_checkpoint(target: str, out: str, foreign: bool = False) -> Checkpoint:
    """TARGET as a checkpoint; a run stands for its last stage that has weights.

    Args:
        target: a path, RUN, or RUN/STAGE below `out`.
        out: the folder of runs.
        foreign: whether a plain peft adapter will do.
    """
    if is_foreign(Path(target).expanduser()):
        if foreign:
            return Checkpoint.open(Path(target).expanduser())
        raise UserError(
            "a plain peft adapter, without a record of its base and template",
            code="foreign_adapter",
            file=target,
            hint=f"a stage can start from it: stages.sft.init={target}",
        )
    folder = resolve_target(target, out)
    if (folder / RECORD).is_file():
        return Checkpoint.open(folder)
    run = RunRecord.open(folder)
    made = [Checkpoint.open(run.at(entry)) for entry in run.finished(RECORD)]
    speaking = [checkpoint for checkpoint in made if checkpoint.record["role"] == "policy"] or made
    if not speaking:
        raise UserError("this run has no finished stage with weights yet", file=str(folder))
    return speaking[-1]


def _stage_folder(folder: Path, stage: str) -> Path | None:
    if not is_run(folder):
        return None
    run = RunRecord.open(folder)
    return next((run.at(entry) for entry in run.stages if entry.name == stage and run.at(entry).is_dir()), None)
