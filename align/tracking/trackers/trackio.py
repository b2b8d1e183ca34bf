"""Trackio: a database on this machine, in the package's own place (`TRACKIO_DIR`); `trackio show` opens it.

Rows keep the order in which they came; the step of a stage is logged as `STAGE/step`, since every stage counts from 0.
Unless `tracking.mode=online`, nothing is sent to a Space or server, whatever the environment says.
"""

from __future__ import annotations

import os

from align.config.registries import trackers
from align.tracking.trackers.base import Facts, StageFacts, Tracker, keyed


@trackers.register("trackio")
class Trackio(Tracker):
    """A local database with a dashboard."""

    package = "trackio"

    def start(self, run: Facts) -> dict[str, str | None]:
        if run.mode != "online":
            for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
                os.environ.pop(name, None)
        import trackio
        from trackio.utils import TRACKIO_DIR

        self.run = trackio.init(
            project=run.project,
            name=f"{run.name}-{run.id}",  # its runs are found again by name alone
            group=run.group,
            config={**run.config, "tags": run.tags},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return {"dir": str(TRACKIO_DIR)}

    def log(self, stage: str, step: int, split: str, values: dict[str, float]) -> None:
        self.run.log({**keyed(stage, split, values), f"{stage}/step": step})

    def stage_done(self, stage: StageFacts) -> None:
        import trackio

        columns, rows = stage.samples()
        table = {f"{stage.name}/samples": trackio.Table(columns=columns, data=rows)} if rows else {}
        self.run.log({**stage.numbers, **table})

    def finish(self, status: str) -> None:
        self.run.log({"exit_code": 0 if status == "done" else 1})
        self.run.finish()
