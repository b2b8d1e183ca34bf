"""Weights & Biases: config, metrics, samples and checkpoints, offline unless asked (`tracking.mode`, `WANDB_MODE`).

Every stage counts its own steps, and wandb refuses steps that go back, so each stage has the step metric `STAGE/step`.
A checkpoint is an artifact named `STAGE-DIGEST`; what it was made from is declared as the run's input by the same
content, so the lineage graph joins runs that share a checkpoint. Offline runs are sent later with `wandb sync`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.registries import trackers
from align.tracking.trackers.base import Facts, StageFacts, Tracker, keyed

if TYPE_CHECKING:
    import wandb


@trackers.register("wandb")
class WandB(Tracker):
    """Weights & Biases, offline or online."""

    package = "wandb"

    def start(self, run: Facts) -> dict[str, str | None]:
        import wandb

        self.facts = run
        self.stages: set[str] = set()
        place = Path(os.environ.get("WANDB_DIR") or run.own_folder)
        place.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("WANDB_DATA_DIR", str(place))  # tables wait there until an offline run is sent
        mode: Any = run.mode or os.environ.get("WANDB_MODE") or "offline"
        self.run = wandb.init(
            project=run.project,
            entity=run.entity,
            group=run.group,
            tags=run.tags or None,
            name=run.name,
            id=run.id,
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=str(place),
            config=run.config,
            settings=wandb.Settings(console="off", silent=True),
        )
        return {"url": self.run.url, "dir": str(Path(self.run.dir).parent)}

    def log(self, stage: str, step: int, split: str, values: dict[str, float]) -> None:
        if stage not in self.stages:
            self.stages.add(stage)
            self.run.define_metric(f"{stage}/step")
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self.run.log({**keyed(stage, split, values), f"{stage}/step": step})

    def stage_done(self, stage: StageFacts) -> None:
        import wandb

        self.run.summary.update(stage.numbers)
        columns, rows = stage.samples()
        if rows:
            self.run.log({f"{stage.name}/samples": wandb.Table(columns=[*columns], data=[*rows])})
        folder = Path(stage.folder)
        if not (folder / "checkpoint.json").is_file():
            return
        record = _record(folder)
        for parent in record["parents"]:
            self._use((folder / parent["path"]).resolve(), parent["digest"])
        artifact = self._artifact(folder, stage.entry["digest"])
        self.run.log_artifact(artifact, aliases=["latest", self.facts.name])

    def finish(self, status: str) -> None:
        self.run.summary["status"] = status
        self.run.finish(exit_code=0 if status == "done" else 1)

    def _use(self, folder: Path, digest: str) -> None:
        """Declare a checkpoint as an input of the run. One whose folder is gone is named in the metadata alone."""
        if (folder / "checkpoint.json").is_file():
            # The public `use_artifact` refuses to work offline; this is the call that it makes online.
            artifact = self._artifact(folder, digest)
            self.run._log_artifact(artifact, aliases=[], is_user_created=True, use_after_commit=True)

    def _artifact(self, folder: Path, digest: str) -> wandb.Artifact:
        """A checkpoint as an artifact: equal content gives the same artifact, whichever run declares it."""
        import wandb

        record = _record(folder)
        metadata = {
            "digest": digest,
            "parents": [{key: parent[key] for key in ("role", "digest")} for parent in record["parents"]],
            **{key: record[key] for key in ("stage", "role", "method", "options", "on_parent", "load", "base")},
            "metrics": record["metrics"],
        }
        artifact = wandb.Artifact(f"{record['stage']}-{digest[:12]}", type="model", metadata=metadata)
        for name in ["checkpoint.json", *(record["files"] if self.facts.weights else ())]:
            artifact.add_file(str(folder / name), name=name, policy="immutable")
        return artifact


def _record(folder: Path) -> dict[str, Any]:
    """The checkpoint's record."""
    record: dict[str, Any] = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
    return record
