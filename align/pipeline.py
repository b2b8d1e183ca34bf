"""run(config): the stages in order, each found done or trained, published and recorded.

This is the one road from a configuration to a result; a single stage is a pipeline of one. Every stage is planned
before the first is trained, and begins with the plan that it got then.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.checkpoints.checkpoint import Checkpoint
from align.checkpoints.compatibility import Input, StagePlan
from align.checkpoints.peft_adapter import unknown_of
from align.config.schema import Load, RunConfig, Shard
from align.models.resolve import base_identity, find_base, open_renderer
from align.planning.preflight import require_plans
from align.run_record import StageEntry
from align.runs.environment import free_gpu, kernels, peak_gpu, peak_rss, quieten, reset_peak_gpu, reset_peak_rss
from align.runs.folder import (
    SharedStages,
    StageFolder,
    finished,
    gone_if_refused,
    home_of,
    locked,
    make_folder,
    place_of,
    yaml_text,
)
from align.runs.launcher import check_launcher
from align.runs.processes import join_processes, launched, together
from align.runs.record import Run, done_entry, inputs_of
from align.stages.base import Stage, TrainingStage
from align.training.inputs import Inputs
from align.training.options import OnMemory
from data_prep.core.files import publish, write_json
from data_prep.core.hashing import file_sha256
from data_prep.core.interrupts import interrupts

if TYPE_CHECKING:
    from align.training.context import StageContext

_LEAST_TOKENS = 16
"""A pass of fewer is not tried where memory runs out."""


def run(config: RunConfig, shared: SharedStages | None = None) -> dict[str, Any]:
    """Run every stage of `config` that is not finished yet; returns the content of run.json.

        record = align.run(align.compose(["pipeline=sft", "adapter=vera", "stages.sft.max_steps=2", "name=first"]))
        assert record["status"] == "done"
        model, tokenizer = align.load("first")

    Args:
        shared: for a job of a sweep, which waits where another process is at work instead of refusing.

    Raises:
        UserError: something does not fit; nothing already saved is touched.
        TrainingStopped: training stopped itself; finished stages stay.
        KeyboardInterrupt: a signal ended it, with a state kept or after a stage; the same call goes on.
    """
    quieten()
    with interrupts.handled(passed_on=launched() > 1), kernels(config.deterministic):
        return _run(config, shared)


def _run(config: RunConfig, shared: SharedStages | None) -> dict[str, Any]:
    """`run`, with signals taken."""
    is_new = not place_of(config).exists()
    is_fresh = config.model.init is not None
    base_folder = None if is_fresh else find_base(config, place_of(config))
    plans = require_plans(config, base_folder)
    check_launcher(config.stages)
    process = join_processes()  # before any of them writes
    folder = make_folder(config)
    waiting = f"another process works on {folder}; waiting for it" if shared else None
    goes = gone_if_refused(folder) if is_new and process.is_main_process else nullcontext()
    with locked(folder, waiting=waiting), goes:
        with together(process), process.main_process_first():  # a fresh base is written by one of them
            base_folder = base_folder or find_base(config, folder)
        work = Run(config, folder, base_folder, process, is_new, shared)
        with work.recorded(), together(process):
            plans = require_plans(config, base_folder) if is_fresh else plans
            for place, plan in enumerate(plans):
                _stage(work, plan, plans[place + 1 :])
    interrupts.settle()
    if interrupts.wanted:
        raise KeyboardInterrupt("all stages are done")
    return work.record.as_dict()


def _stage(work: Run, planned: StagePlan[Input], later: Sequence[StagePlan[Input]]) -> None:
    """One stage: found done with equal inputs, else trained; recorded either way.

    Before the first that is trained, the rows of those after it are read: they may not be good for anything.
    """
    work.stage = planned.spec.name
    plan = planned.begin(work.config, work.made, work.base_folder)
    if plan.init is not None and plan.init.foreign and work.is_main:
        print(unknown_of(plan.init.record, plan.init.folder), file=sys.stderr)
    inputs = inputs_of(work, plan)
    home = home_of(work.folder, plan.spec.name, inputs.digest, work.shared)
    with home.held():
        work.accelerator.wait_for_everyone()  # one process holds the lock for all
        entry = finished(home, inputs.digest)
        work.announce()
        if entry is None:
            work.begin(home)
            if not work.read_ahead:
                _read_ahead(work, later)
            entry = _train(work, plan, inputs, home)
    interrupts.defer()  # a stage that is there is recorded first, and with the last one the run
    work.finish(home, entry)
    if work.stage == work.config.stages[-1].name:
        return
    interrupts.settle()
    if work.asked_to_end():
        raise KeyboardInterrupt(f"{work.stage} is done: the same command goes on behind it")


def _read_ahead(work: Run, plans: Sequence[StagePlan[Input]]) -> None:
    """Stop at the rows of a later stage before an earlier one has been trained; one process reads them."""
    from align.planning.rows import require_rows
    from align.training.processes import as_one

    work.read_ahead = True
    with as_one(work.accelerator):
        if work.is_main:
            require_rows(work.config, plans, work.base_folder)


def _train(work: Run, plan: StagePlan[Checkpoint], inputs: Inputs, home: StageFolder) -> StageEntry:
    """Run a stage in its staging folder and publish the result; returns its entry for run.json."""
    from align.training.processes import as_one

    started, device = time.monotonic(), str(work.accelerator.device)
    reset_peak_rss()
    reset_peak_gpu(device)
    context, saved = _within_memory(work, plan, inputs, home.staging)
    interrupts.defer()  # what is done is published first
    work.accelerator.wait_for_everyone()  # every process has read the staging folder back before it is renamed
    with as_one(work.accelerator):
        if work.is_main:
            _publish(home, saved, inputs.digest)
    own = file_sha256(home.final / ("checkpoint.json" if saved is not None else "result.json"))
    peaks = {"peak_rss_bytes": peak_rss(), "peak_gpu_bytes": peak_gpu(device)}
    numbers = {**peaks, **context.measured(), "seconds": round(time.monotonic() - started, 3)}
    entry = done_entry(plan, own, numbers)
    if work.is_main:
        home.keep(entry)
    del context
    gc.collect()
    return entry


def _doubt_base(context: StageContext, device: str) -> None:
    """Say where a frozen base takes twice the memory on a card, and its weights are made narrow again in every pass."""
    can_be_narrow = context.spec.stage.trains and context.spec.adapter.traits.bf16
    if device.startswith("cuda") and can_be_narrow and context.parent_mode.load is Load.fp32:
        hint = "set model.load=bf16, or adapter=qlora"
        context.warn("float32_base", "the frozen base is held in float32 on a GPU, twice what bf16 takes", hint)


def _within_memory(
    work: Run, plan: StagePlan[Checkpoint], inputs: Inputs, staging: Path
) -> tuple[StageContext, Checkpoint | None]:
    """Run the stage. Where memory runs out, say what makes its passes smaller, or make them so and go on."""
    from align.models.memory import OutOfMemory, told_of

    passes, told = inputs, ""
    while True:
        context = _context(work, plan, inputs.digest, passes, staging)
        (staging / "recipe.yaml").write_text(yaml_text(work.config.resolved["stages"][work.stage]), encoding="utf-8")
        _doubt_base(context, str(work.accelerator.device))
        if told:
            context.warn("smaller_passes", told, "set it, and no pass is tried in vain")
        try:
            with told_of():
                return context, plan.spec.stage.run(context)
        except OutOfMemory as error:
            where, stage, tokens = f"stages.{plan.spec.name}", plan.spec.stage, error.tokens
            lighter = _lighter(work, stage, tokens)
            if lighter is None:
                raise OutOfMemory(tokens, where, stage.smaller_passes(where, tokens)) from None
            told = f"{error.message}; computed with {where}.micro_tokens={lighter.micro_tokens} from there on"
        del context
        gc.collect()
        free_gpu(str(work.accelerator.device))
        plan = replace(plan, spec=replace(plan.spec, stage=lighter))
        passes = inputs.with_options(micro_tokens=lighter.micro_tokens)


def _lighter(work: Run, stage: Stage, tokens: int | None) -> TrainingStage | None:
    """The stage with half the tokens of a pass that did not fit, where that is asked for and can help.

    It cannot where one row is longer than a pass may be; and of several processes the others would wait.
    """
    if not isinstance(stage, TrainingStage) or stage.on_out_of_memory is OnMemory.stop:
        return None
    fewer, is_row = stage.half_of(tokens), bool(stage.micro_tokens and tokens and tokens > stage.micro_tokens)
    if is_row or fewer < _LEAST_TOKENS or work.accelerator.num_processes > 1:
        return None
    return replace(stage, micro_tokens=fewer)


def _context(work: Run, plan: StagePlan[Checkpoint], digest: str, inputs: Inputs, staging: Path) -> StageContext:
    """What a stage works with, in a staging folder that holds no more than the state of an earlier run."""
    from align.roles import Bases
    from align.tracking.metrics import Metrics
    from align.training.context import StageContext
    from align.training.resume import StateSaver, prepare

    name, stage = plan.spec.name, plan.spec.stage
    minutes = stage.save_minutes if isinstance(stage, TrainingStage) else 0.0
    kept = prepare(staging, inputs, minutes) if work.is_main else None
    if kept is not None and (said := kept.said()):
        print(f"{name}: {said}", file=sys.stderr)
    work.accelerator.wait_for_everyone()
    context = StageContext(
        config=work.config,
        plan=plan,
        accelerator=work.accelerator,
        bases=Bases(
            work.base_folder,
            base_identity(work.config, work.base_folder),
            work.accelerator.device,
            work.config.model.plain,
            shard=work.config.distributed.shard if work.accelerator.num_processes > 1 else Shard.none,
        ),
        renderer=open_renderer(work.base_folder),
        staging=staging,
        metrics=Metrics(staging / "metrics.jsonl", name, work.tracks.row),
        inputs_digest=digest,
        saver=StateSaver(staging, inputs, minutes, work.is_main),
    )
    if kept is not None and kept.step and kept.changed:
        message = f"from step {kept.step} on computed with {', '.join(kept.changed)}"
        context.warn("other_passes", message, "the result is that of neither to the bit, and as good as either")
    return context


def _publish(home: StageFolder, saved: Checkpoint | None, digest: str) -> None:
    """Give a stage's folder its name: what lies there is finished."""
    from align.training.resume import forget

    if saved is None:
        write_json(home.staging / "inputs.json", {"inputs_digest": digest})
    forget(home.staging)
    publish(home.staging, home.final)
