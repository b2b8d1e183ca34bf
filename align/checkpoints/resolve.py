"""From what a user types (a path, RUN, RUN/STAGE, last, last/STAGE) to a checkpoint or run folder."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from align.checkpoints.checkpoint import RECORD, Checkpoint, nearby_runs
from align.checkpoints.peft_adapter import is_foreign
from align.models.fingerprint import read_model_config
from align.run_record import ANEW, RunRecord, is_run
from data_prep.core.errors import UserError

LAST = "last"
"""Stands for the newest run, where a command is typed; never in a recipe, which is to mean the same tomorrow."""


def newest(target: str, out: str) -> str:
    """TARGET with the newest run below `out` in place of `last`.

    Raises:
        UserError: there is no run yet.
    """
    first, _, stage = target.partition("/")
    if first != LAST or Path(target).exists() or (Path(out) / LAST).exists():
        return target
    runs = sorted(Path(out).glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError(f"no run yet in {out}", code="unknown_target", hint="align run makes one; out=DIR looks in DIR")
    return str(runs[-1].parent / stage)


def resolve_target(target: str, out: str, foreign: bool = False) -> Path:
    """The checkpoint or run folder that TARGET names: a path, RUN, or RUN/STAGE below `out`.

    `foreign` says whether a plain peft adapter will do.
    """
    if foreign and is_foreign(Path(target).expanduser()):
        return Path(target).expanduser()
    target = newest(target, out)
    for candidate in (Path(target).expanduser(), Path(out) / target):
        if (candidate / RECORD).is_file() or is_run(candidate):
            return candidate
        stage = _stage_folder(candidate.parent, candidate.name)
        if stage is not None:
            return stage
    for path in (Path(target).expanduser(), Path(out) / target):
        if path.exists():
            raise not_a_run(path)
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
    if foreign and is_foreign(Path(target).expanduser()):
        return Checkpoint.open(Path(target).expanduser())
    folder = resolve_target(target, out)
    if (folder / RECORD).is_file():
        return Checkpoint.open(folder)
    if not is_run(folder):
        raise _without_weights(folder)
    run = RunRecord.open(folder)
    made = [Checkpoint.open(run.at(entry)) for entry in run.finished(RECORD)]
    speaking = [checkpoint for checkpoint in made if checkpoint.record["role"] == "policy"] or made
    if not speaking:
        raise UserError("this run has no finished stage with weights yet", file=str(folder))
    return speaking[-1]


def _without_weights(stage: Path) -> UserError:
    """The refusal of a stage of a run that is no checkpoint: it keeps none, or is not finished."""
    run = RunRecord.open(next(filter(is_run, stage.parents)))
    made = [str(run.at(entry)) for entry in run.finished(RECORD)]
    return UserError(
        "this stage keeps no weights, or is not finished: there is no checkpoint in it",
        code="no_weights",
        file=str(stage),
        hint=f"take {' or '.join(made)}" if made else "no stage of its run has weights yet",
    )


def not_a_run(path: Path) -> UserError:
    """What is there instead of a run or checkpoint, and what can be done with it."""
    word = quote(str(path))
    if is_foreign(path):
        return UserError(
            "a plain peft adapter, without a record of its base and template",
            code="foreign_adapter",
            file=str(path),
            hint=f"talk to it with align chat {word}; a stage can start from it: stages.STAGE.init={word}",
        )
    if is_classifier(path):
        return UserError(
            "a stock reward model or classifier, and no checkpoint: it has a head for scores, and no record",
            code="plain_classifier",
            file=str(path),
            hint=f"it can score replies: stages.ppo.reward={word}; to train on, take the language model below it",
        )
    if is_model(path):
        return UserError(
            "a plain model folder, and no run or checkpoint: there is no record of how it was trained",
            code="plain_model",
            file=str(path),
            hint=f"talk to it: align chat {word}; train on it: model=hf model.path={word}, stages.STAGE.init=base",
        )
    holds = ", ".join(sorted(one.name for one in path.iterdir())[:5]) or "nothing" if path.is_dir() else "a file"
    states = sorted(path.glob("checkpoint-*/")) if path.is_dir() else []
    stages = sorted(path.glob(f"*/{RECORD}")) if path.is_dir() else []
    hint = f"is it {states[-1]}?" if states else "a run has run.json, a checkpoint has checkpoint.json"
    if stages:
        hint = f"run.json is missing: {ANEW}; or name a stage, such as {stages[0].parent}"
    return UserError(
        f"holds no run, checkpoint, model or adapter (it has: {holds})",
        code="unknown_target",
        file=str(path),
        hint=hint,
    )


def is_checkpoint(target: str, out: str) -> bool:
    """Whether TARGET names a run or checkpoint."""
    try:
        resolve_target(target, out)
    except UserError:
        return False
    return True


def is_model(path: Path) -> bool:
    """Whether a folder holds a whole language model as transformers writes it, and no checkpoint."""
    whole = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    return whole and not (path / RECORD).is_file() and not is_classifier(path)


def is_classifier(path: Path) -> bool:
    """Whether a folder holds a whole model whose head gives scores or labels."""
    if not (path / "config.json").is_file() or (path / RECORD).is_file():
        return False
    kinds = read_model_config(path).get("architectures") or []
    return any(str(kind).endswith("ForSequenceClassification") for kind in kinds)


def _stage_folder(folder: Path, stage: str) -> Path | None:
    if not is_run(folder):
        return None
    run = RunRecord.open(folder)
    return next((run.at(entry) for entry in run.stages if entry.name == stage and run.at(entry).is_dir()), None)
