"""What a stage works with: its inputs, roles, rows, clock and folder."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from align.checkpoints.checkpoint import Checkpoint
from align.checkpoints.compatibility import ParentMode, StagePlan
from align.config.schema import Decode, RunConfig, Shard, StageSpec
from align.models.fingerprint import read_model_config
from align.models.sharding import layers_of, whole_layers
from align.models.trunk import TrunkCache, alike, attach_trunk, depth_of, release_trunk
from align.roles import Bases, Role
from align.tracking.metrics import Metrics
from align.training.data import Reading, context_of, remarks_of
from align.training.optimizer import autocast
from align.training.processes import as_one, once_a_machine
from align.training.resume import SAMPLES, WARNINGS, StateSaver
from data_prep.core.errors import UserError
from data_prep.prepare.assemble import load
from data_prep.prepare.prepare import Prepared, Renderer
from data_prep.types import features_of


@dataclass
class StageContext:
    """Everything a stage may use. One is made per stage; nothing in it outlives the stage."""

    config: RunConfig
    plan: StagePlan[Checkpoint]
    accelerator: Accelerator
    bases: Bases
    renderer: Renderer
    staging: Path
    """Folder the stage writes into; published under the stage's name when the stage is done."""
    metrics: Metrics
    inputs_digest: str
    saver: StateSaver
    numbers: dict[str, Any] = field(default_factory=dict)
    """What the stage wants in run.json: trainable, total, metrics."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds by phase, for run.json; not in metrics.jsonl, which equal runs write equally."""
    labels: dict[str, str] = field(default_factory=dict)
    """Files of people's judgements among the stage's data, with their digests, for the checkpoint's record."""

    @property
    def spec(self) -> StageSpec:
        return self.plan.spec

    @property
    def init(self) -> Checkpoint | None:
        """The checkpoint that the stage stands on."""
        return self.plan.init

    @property
    def reward(self) -> Checkpoint | None:
        return self.plan.reward

    @property
    def below(self) -> Checkpoint | None:
        """What the stage's adapter stands on: `init`, but where the stage goes on with its reward model."""
        return self.plan.below

    @property
    def judges(self) -> list[Checkpoint]:
        """The reward models, of which `reward` is the first."""
        return self.plan.judges

    @property
    def parent_mode(self) -> ParentMode:
        return self.plan.require()

    @property
    def seed(self) -> int:
        return self.config.seed + int(self.spec.stage.seed_offset)

    @property
    def lr(self) -> float:
        """The stage's peak learning rate: as set, else its default for this adapter and model."""
        return float(self.spec.stage.peak_lr(self.spec.adapter, self.config.model.lr_scale))

    @property
    def context(self) -> int | None:
        """Longest row in tokens that the model takes behind the virtual tokens of its roles, if it has a limit."""
        return context_of(read_model_config(self.bases.folder), self.spec.adapter, (self.init, *self.judges))

    def rows(self, kind: str) -> Prepared[Any]:
        """The stage's rows of one kind of data as token ids, within the model's context.

        Raises:
            UserError: bad rows, too many that are too long, or too few that are left.
        """
        config = read_model_config(self.bases.folder)
        below = (self.init, *self.judges)
        reading = Reading(self.spec, self.renderer, config, self.context, self.config.seed, below)
        prepared = self._prepared(reading, kind)
        reading.require_fit(kind, prepared)
        for remark in remarks_of(prepared.card):
            self.warn(remark.code, f"{remark.file}:{remark.field}: {remark.message}", remark.hint)
        return prepared

    def _prepared(self, reading: Reading, kind: str) -> Prepared[Any]:
        """The rows of one kind; several processes of a machine map the file that one of them has made."""
        if self.accelerator.num_processes == 1:
            return reading.rows(kind)
        folder = once_a_machine(self.accelerator, lambda: reading.folder(kind))
        with as_one(self.accelerator):  # a file that is not kept goes with the process that has made it
            return load(folder)

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def autocast(self) -> AbstractContextManager[Any]:
        """Context of every forward pass of the stage, at its precision."""
        return autocast(self.spec.stage, self.accelerator.device)

    @contextmanager
    def answering(self, role: Role) -> Iterator[None]:
        """Context in which the role writes replies; all processes come here, whatever each has to write."""
        decode = self.config.distributed.decode
        with whole_layers(role.tree) if decode is Decode.whole else nullcontext():
            yield

    @contextmanager
    def trunk_shared(self, role: Role, others: Sequence[Role], again: bool, together: bool = False) -> Iterator[None]:
        """Context in which the blocks below the lowest one that `role` trains are computed once a row.

        For the role itself and those of the others that have the same blocks there.

        Args:
            again: whether the role reads rows in several passes; if not, it is done for several roles alone.
            together: whether nothing is kept from one state of the stage to the next, so that rows need not be computed
                each alone to go on to the same bits.
        """
        trees = {each.name: each.tree for each in (role, *others)}
        room = self.spec.stage.trunk_room(self.accelerator.device.type)
        names = alike(trees, role.name) if room else []
        shared = {name: trees[name] for name in names} if len(names) > 1 or again else {}
        try:
            if shared:
                self._attach_trunk(shared, depth_of(role.tree), room, together)
            yield
        finally:
            for tree in shared.values():
                release_trunk(tree)

    def _attach_trunk(self, trees: dict[str, PreTrainedModel], depth: int, room: int, together: bool) -> None:
        """Give trees of one trunk a cache of so many bytes, or say why they have none."""
        name = f"stages.{self.spec.name}"

        def full() -> None:
            self.warn(
                "trunk_cache_full",
                f"the trunk cache of {room / 1e9:g} GB is full: of further rows nothing is kept",
                f"raise {name}.trunk_cache",
            )

        try:
            if self.spec.stage.neftune:
                raise UserError("noise on embeddings (neftune) changes what every block gives")
            if self.bases.shard is not Shard.none:
                raise UserError("blocks of a base that is cut cannot be left out of a pass")
            with self.autocast():
                attach_trunk(trees, depth, TrunkCache(room, together, full))
        except UserError as problem:
            off = f"set {name}.trunk_cache=0 to leave this warning out"
            self.warn("no_trunk_cache", f"every pass computes all blocks: {problem.message}", off)
        else:
            if self.is_main:
                blocks = len(layers_of(next(iter(trees.values()))))
                told = f"{depth} of {blocks} blocks are computed once a row, for {', '.join(trees)}"
                print(f"{self.spec.name}: {told}", file=sys.stderr)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time spent inside towards a phase of the stage."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.monotonic() - started

    def measured(self) -> dict[str, Any]:
        """What run.json says of the finished stage's work."""
        return {
            "trainable": self.numbers.get("trainable", 0),
            "total": self.numbers.get("total", 0),
            "tokens": self.numbers.get("tokens"),
            "metrics": self.numbers.get("metrics", {}),
            "phases": {name: round(seconds, 3) for name, seconds in self.phases.items()},
        }

    def fresh_role(self, name: str) -> Role:
        """The stage's trainable role on its parent, with deterministic initial adapter weights."""
        torch.manual_seed(self.seed)
        return self.bases.fresh(self.below, self.spec.adapter, self.parent_mode, name)

    def start_role(self, name: str) -> Role:
        """The frozen function that the stage's fresh role starts from."""
        if self.parent_mode.mode is None and not self.spec.adapter.traits.starts_as_parent:
            return self.fresh_role(name).freeze()
        return self.bases.start_of(self.below, self.parent_mode, name)

    def warn(self, code: str, message: str, hint: str | None = None) -> None:
        """Say at once, and again at the end of the run, what deserves a second look.

        It is kept in warnings.jsonl beside the result, from where it comes into `run.json`, the report and the last
        lines in the terminal. The same warning given twice stands once; only the main process writes.

        Args:
            code: short machine-readable name, the same for all warnings of a kind.
            message: what is so, in one sentence with its numbers; it ends without a full stop.
            hint: what to do about it: the option to set, best with its value.
        """
        row = json.dumps({"code": code, "message": message, "hint": hint}, ensure_ascii=False) + "\n"
        path = self.staging / WARNINGS
        if not self.is_main or (path.is_file() and row in path.read_text(encoding="utf-8").splitlines(keepends=True)):
            return
        with path.open("a", encoding="utf-8") as stream:
            stream.write(row)
        print(f"{self.spec.name}: warning: {message}{f'; {hint}' if hint else ''}", file=sys.stderr)

    def write_card(self, prepared: Prepared[Any]) -> None:
        """Keep the data card beside the result, and the digests of people's judgements for its record."""
        cards = [prepared.card, *prepared.card.get("sources", {}).values()]
        self.labels = {file: digest for card in cards for file, digest in card.get("labels", {}).items()}
        if self.is_main:
            (self.staging / "data_card.json").write_text(
                json.dumps(prepared.card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )


def said_features(ids: Sequence[int]) -> dict[str, Any]:
    """What samples say of the features of a row: nothing where it has none."""
    features = features_of(ids)
    return {} if features is None else {"features": features}


def write_samples(context: StageContext, rows: Sequence[dict[str, Any]]) -> None:
    """Keep some inputs and outputs of the stage in samples.jsonl, to be read by people."""
    if context.is_main:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (context.staging / SAMPLES).write_text("".join(lines), encoding="utf-8")
