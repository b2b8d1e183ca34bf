"""Going on inside a stage: what a stage at work keeps now and then, so that a stopped run ends in the same bits.

    .staging-sft/resume/step-400/state.safetensors  trained tensors and those of the optimiser; where processes have
                                                    parts of them, those of the first, and state-1.safetensors of the
                                                    second, and so on
    .staging-sft/resume/step-400/metrics.jsonl      what had been told until then; where there were some,
                                                    warnings.jsonl, samples.jsonl and sampled.jsonl, too
    .staging-sft/resume/step-400/state.json         all else, and what it is the state of; written last

The order of rows, the prompts of an update, sampled replies and dropout are functions of the seed and the step
(`align/training/batching.py`, `align/rl/ppo.py`, `align/training/loop.py`), so nothing else needs keeping. The newest
state alone stays, and none once the stage is finished. One of other inputs is set aside as `resume-DIGEST`, where the
stage with those inputs finds it again.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from align.models.sharding import held, part_like
from align.training.inputs import Inputs
from align.training.processes import as_one
from data_prep.core.errors import TrainingStopped, UserError, said_by
from data_prep.core.files import sync, write_json
from data_prep.core.interrupts import interrupts

if TYPE_CHECKING:
    from align.training.optimizer import Updater

FOLDER, STATE, RECORD = "resume", "state.safetensors", "state.json"
METRICS, WARNINGS, SAMPLES = "metrics.jsonl", "warnings.jsonl", "samples.jsonl"
SAMPLED = "sampled.jsonl"
"""Rows that a stage made before it trained: a judge might answer otherwise if it were asked again."""
_FORMAT = 2
_SHARE = 50  # times as long as a state took to keep, no other is kept


@dataclass(frozen=True)
class Kept:
    """What a stage finds of earlier attempts as it begins."""

    step: int = 0
    """Steps that the state has seen which it goes on from; 0: it begins anew."""
    changed: tuple[str, ...] = ()
    """What is not as it was when that state was kept, or, without one, the state that was set aside."""
    aside: int = 0
    """Steps of the state that was set aside."""

    def said(self) -> str:
        """In words; nothing where there was nothing."""
        if self.step:
            return f"goes on after step {self.step}, where it was stopped"
        if not self.aside:
            return ""
        changed = ", ".join(self.changed[:4]) + ", ..." * (len(self.changed) > 4)
        return f"begins anew with {changed}; without, the state after step {self.aside} is still there to go on from"


def prepare(staging: Path, inputs: Inputs, minutes: float) -> Kept:
    """A staging folder that is empty but for kept states, with the metrics that belong to that of these inputs.

    Where none is to be taken up (`minutes` is 0), nothing stays.
    """
    own, aside, changed = staging / FOLDER, 0, list[str]()
    earlier = _newest(own) if minutes else None
    if earlier is None:  # what was being written when it was cut off is no state
        shutil.rmtree(own, ignore_errors=True)
    elif earlier.inputs.work_digest != inputs.work_digest:
        aside, changed = earlier.step, inputs.changed_from(earlier.inputs)
        own.rename(staging / f"{FOLDER}-{earlier.inputs.work_digest[:8]}")
    there = staging / f"{FOLDER}-{inputs.work_digest[:8]}"
    if minutes and there.is_dir() and not own.exists():
        there.rename(own)
    kept = newest(staging, inputs) if minutes else None
    if kept is None:
        _clear(staging, [path for path in staging.glob(f"{FOLDER}-*") if minutes])
        return Kept(0, tuple(changed), aside)
    _clear(staging, [own, *staging.glob(f"{FOLDER}-*")])
    _clear(own, [kept.folder])
    _copy_told(kept.folder, staging)
    return Kept(kept.step, tuple(inputs.changed_from(kept.inputs)))


def forget(staging: Path) -> None:
    """Remove every state: the stage is finished."""
    for path in staging.glob(f"{FOLDER}*"):
        shutil.rmtree(path, ignore_errors=True)


def _clear(folder: Path, stays: list[Path]) -> None:
    """Remove what a folder holds, but for some of it; the folder is there then."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path not in stays:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _copy_told(source: Path, target: Path) -> None:
    """What a stage had told until a state, from one folder to the other."""
    for name in (METRICS, WARNINGS, SAMPLES, SAMPLED):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


@dataclass(frozen=True)
class State:
    """A whole state on disk."""

    folder: Path
    step: int
    inputs: Inputs


def newest(staging: Path, inputs: Inputs) -> State | None:
    """The newest whole state, if these inputs can go on from it."""
    last = _newest(staging / FOLDER)
    return last if last is not None and last.inputs.work_digest == inputs.work_digest else None


def _newest(folder: Path) -> State | None:
    found = [path for path in folder.glob("step-*") if (path / RECORD).is_file()]
    last = max(found, key=_step, default=None)
    if last is None:
        return None
    record = json.loads((last / RECORD).read_text(encoding="utf-8"))
    return State(last, _step(last), Inputs(record["inputs"])) if record["format"] == _FORMAT else None


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


@dataclass
class StateSaver:
    """Keeps the state of one stage at work, and gives back what an earlier run of it has kept.

    Args:
        staging: the stage's staging folder, prepared.
        inputs: what decides the stage's result.
        minutes: least time between two states; 0: none is kept. Large states are kept less often, so that they take
            no more than a fiftieth of the time.
        writes: whether this process writes (one of several does, where all hold the same).
    """

    staging: Path
    inputs: Inputs
    minutes: float
    writes: bool = True
    _next: float = 0.0
    """When the next state is due."""

    def __post_init__(self) -> None:
        self._next = time.monotonic() + 60 * self.minutes

    @property
    def step(self) -> int:
        """Steps that the kept state has seen; 0 where there is none."""
        kept = self._kept()
        return kept.step if kept is not None else 0

    def _kept(self) -> State | None:
        return newest(self.staging, self.inputs) if self.minutes else None

    def restore(self, updater: Updater) -> dict[str, Any]:
        """Put trained tensors, optimiser and position back; returns what the loop kept beside them, {} for nothing.

        From here on a signal waits for the end of a step (`offer`), or of the stage.

        Raises:
            UserError: there is a state, but it cannot be read or lacks something.
        """
        if self.minutes:
            interrupts.defer()
        found = self._kept()
        if found is None:
            return {}
        kept = found.folder
        try:
            record = json.loads((kept / RECORD).read_text(encoding="utf-8"))
            files = [load_file(kept / _state_file(number)) for number in range(record.get("files", 1))]
            cut = next((tensor for tensor in updater.held().values() if isinstance(tensor, DTensor)), None)
            state = _joined(record["state"], lambda name: _read(name, files, cut))
            updater.put_back(state["tensors"])
            updater.load_moments(state["optimizer"])
        except Exception as problem:
            raise UserError(
                f"the kept state cannot be read ({said_by(problem)})",
                code="bad_state",
                file=str(kept / STATE),
                hint=f"delete the folder {kept.parent}, and the stage begins anew",
            ) from problem
        updater.step_number = state["step_number"]
        more: dict[str, Any] = state["more"]
        return more

    def offer(self, updater: Updater, step: int, more: dict[str, Any]) -> None:
        """Keep the state after step `step` if it is time; that it cannot be kept is told, and the work goes on.

        Raises:
            KeyboardInterrupt: a signal has asked the run to end; the state is kept.
        """
        began, ends = time.monotonic(), updater.ends and bool(self.minutes)
        due = bool(self.minutes) and self.writes and (ends or began >= self._next)
        if self.minutes and updater.trains_parts:
            due = updater.agreed(due)  # by the clock of the one that writes the record
        if due:
            self.keep(updater, step, more)
            ended = time.monotonic()
            self._next = ended + max(60 * self.minutes, _SHARE * (ended - began))
        if ends:
            updater.accelerator.wait_for_everyone()  # none leaves while the state is being written
            said = f"the state after step {step} is kept: the same command goes on there"
            raise KeyboardInterrupt(said if self.step == step else "")

    def keep(self, updater: Updater, step: int, more: dict[str, Any]) -> bool:
        """Keep the state after step `step` now, where states are kept at all; whether there is one then.

        One of that step stays as it is: all that it may lack is a look, which is made again.
        """
        if not (self.minutes and (self.writes or updater.trains_parts)):
            return False
        if self.step == step:
            return True
        try:
            self._keep(updater, step, more)
        except (OSError, SafetensorError, UserError, TrainingStopped) as problem:
            if self.writes:
                print(f"the state after step {step} was not kept ({said_by(problem)})", file=sys.stderr)
            return False
        return True

    def _keep(self, updater: Updater, step: int, more: dict[str, Any]) -> None:
        """The processes go one step at a time where each has parts to write; else one does all of it."""
        folder = self.staging / FOLDER
        writing, done = folder / ".writing", folder / f"step-{step}"
        together = partial(as_one, updater.accelerator) if updater.trains_parts else nullcontext
        state = {
            "tensors": updater.held(),
            "optimizer": updater.optimizer.state_dict(),
            "step_number": updater.step_number,
            "more": more,
        }
        try:
            with together():
                if self.writes:
                    shutil.rmtree(writing, ignore_errors=True)
                    writing.mkdir(parents=True)
            tensors: dict[str, Tensor] = {}
            rest = _apart(state, tensors, "", self.writes)
            with together():
                file = writing / _state_file(0 if self.writes else updater.accelerator.process_index)
                save_file(tensors, file)
                sync(file)
            with together():
                if self.writes:
                    files = updater.accelerator.num_processes if updater.trains_parts else 1
                    self._finish(writing, done, {"step": step, "files": files, "state": rest})
        finally:
            if self.writes:
                shutil.rmtree(writing, ignore_errors=True)

    def _finish(self, writing: Path, done: Path, record: dict[str, Any]) -> None:
        """Write what else belongs to a state, give it its name, and let older ones go."""
        _copy_told(self.staging, writing)
        write_json(writing / RECORD, {"format": _FORMAT, "inputs": self.inputs.values, **record})
        older = [path for path in writing.parent.iterdir() if path != writing]
        writing.rename(done)
        sync(done.parent)
        for path in older:
            shutil.rmtree(path, ignore_errors=True)


def _read(name: str, files: list[dict[str, Tensor]], cut: DTensor | None) -> Tensor:
    """A tensor of a state; of one that processes had parts of, as this one holds a tensor that is `cut`, if any is."""
    pieces = [file[name] for file in files if name in file]
    return pieces[0] if len(pieces) == 1 else part_like(pieces, pieces[0] if cut is None else cut)


def _state_file(number: int) -> str:
    """The file of a process's tensors."""
    return f"state-{number}.safetensors" if number else STATE


# JSON has no tensors, tuples, keys that are numbers, or infinite numbers: each stands there as {"$": what, "": value}.
def _apart(value: Any, tensors: dict[str, Tensor], name: str, main: bool) -> Any:
    """A state as JSON holds it; its tensors go into `tensors`, under their paths.

    Of a tensor that is cut each process takes its part, of others the main one all.
    """
    if isinstance(value, Tensor):
        if main or isinstance(value, DTensor):
            tensors[name] = held(value.detach()).cpu().contiguous().clone()  # no two may share their memory
        return {"$": "tensor", "": name}
    if isinstance(value, dict):
        pairs = [[key, _apart(one, tensors, f"{name}/{key}", main)] for key, one in value.items()]
        return {"$": "dict", "": pairs}
    if isinstance(value, (list, tuple)):
        listed = [_apart(one, tensors, f"{name}/{place}", main) for place, one in enumerate(value)]
        return {"$": "tuple", "": listed} if isinstance(value, tuple) else listed
    if isinstance(value, float) and not math.isfinite(value):
        return {"$": "float", "": str(value)}
    return value


def _joined(value: Any, tensor_of: Callable[[str], Tensor]) -> Any:
    """What `_apart` took apart."""
    if isinstance(value, list):
        return [_joined(one, tensor_of) for one in value]
    if not isinstance(value, dict):
        return value
    kind, inside = value["$"], value[""]
    if kind == "tensor":
        return tensor_of(inside)
    if kind == "dict":
        return {key: _joined(one, tensor_of) for key, one in inside}
    return tuple(_joined(one, tensor_of) for one in inside) if kind == "tuple" else float(inside)
