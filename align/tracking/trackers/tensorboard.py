"""TensorBoard: event files in RUN/tracking/tensorboard, so that `tensorboard --logdir OUT` shows every run by name.

Written with the `tensorboard` package alone; torch and TensorFlow are not needed. Curves by optimiser step, final
numbers at the stage's last step, the recipe and the samples as text.
"""

from __future__ import annotations

import json
import time
from typing import Any

from align.config.registries import trackers
from align.tracking.trackers.base import Facts, StageFacts, Tracker, keyed


@trackers.register("tensorboard")
class TensorBoard(Tracker):
    """Event files in the run folder."""

    package = "tensorboard"

    def start(self, run: Facts) -> dict[str, str | None]:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = run.own_folder / "tensorboard"
        self.steps: dict[str, int] = {}
        self.writer = EventFileWriter(str(folder), flush_secs=10)
        if not run.resumed:
            self._text("recipe", f"```\n{json.dumps(run.config, indent=1, ensure_ascii=False)}\n```", 0)
        return {"dir": str(folder)}

    def log(self, stage: str, step: int, split: str, values: dict[str, float]) -> None:
        self.steps[stage] = step
        self._scalars(keyed(stage, split, values), step)

    def stage_done(self, stage: StageFacts) -> None:
        step = self.steps.get(stage.name, 0)
        self._scalars(stage.numbers, step)
        columns, rows = stage.samples()
        if rows:
            table = [columns, ["---"] * len(columns), *rows]
            self._text(f"{stage.name}/samples", "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in table), step)
        self.writer.flush()

    def finish(self, status: str) -> None:
        self._text("status", status, 0)
        self.writer.close()

    def _scalars(self, values: dict[str, float], step: int) -> None:
        self._write([{"tag": key, "simple_value": float(value)} for key, value in values.items()], step)

    def _text(self, tag: str, text: str, step: int) -> None:
        """Markdown, as the text tab shows it."""
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.util.tensor_util import make_tensor_proto

        metadata = create_summary_metadata(display_name=tag, description="")
        tensor = make_tensor_proto([text.encode()])
        self._write([{"tag": tag, "tensor": tensor, "metadata": metadata}], step)

    def _write(self, values: list[dict[str, Any]], step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(**value) for value in values])
        self.writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))


def _cell(text: str) -> str:
    """A text inside a Markdown table."""
    return text.replace("|", "\\|").replace("\n", "<br>")
