"""What can be found wrong with a run before any weight loads: data that is missing, or given and never read."""

from __future__ import annotations

from collections.abc import Sequence

from align.config import RunConfig, StageSpec
from align.trackers.base import check_packages
from data_prep.errors import UserError
from data_prep.options import SourceOptions
from data_prep.reading import source_for
from data_prep.sources import find_files, is_hub_id, resolve

KINDS = {
    "conversations": "conversation",
    "preferences": "preference",
    "prompts": "prompt",
    "text": "document",
}
"""What stages call the kinds of data they need, and what `data_prep` calls one row of it."""


def check_sources(config: RunConfig) -> None:
    """Every stage has a source for every kind of row it reads, and every named file exists.

    Raises:
        UserError: a later stage would have failed after the earlier ones had been trained.
    """
    check_packages(config.tracking.to)
    for spec in config.stages:
        for kind in spec.stage.needs_data:
            given = source_for(spec.data, KINDS[kind])
            for path in (given.source.path, given.source.eval_path):
                _check_file(path, spec.data.root)
    _check_path_is_read(config.stages)


def _check_file(path: str | None, root: str | None) -> None:
    """The files of a path are there; a hub id is looked up when it is read."""
    if path is None:
        return
    place = resolve(path, root)
    try:
        find_files(place)
    except UserError:
        if not is_hub_id(path):
            raise


def _check_path_is_read(specs: Sequence[StageSpec]) -> None:
    """`data.path` serves the kinds without a source of their own; where there are none it would be ignored."""
    reading = [spec for spec in specs if spec.data.path and _reads_path(spec)]
    idle = [spec for spec in specs if spec.data.path and spec.stage.needs_data and spec not in reading]
    own = [spec for spec in idle if spec.data.path not in {other.data.path for other in reading}]
    if own:
        raise UserError(
            f"is not read: the data '{own[0].data.name}' brings its own {' and '.join(own[0].stage.needs_data)}",
            field=f"stages.{own[0].name}.data.path",
            hint=f"data=files data.path={own[0].data.path}",
            code="not_read",
        )


def _reads_path(spec: StageSpec) -> bool:
    """Whether a stage gets a kind of row from `data.path`."""
    sources = [source_for(spec.data, KINDS[kind]).source for kind in spec.stage.needs_data]
    return SourceOptions(path=spec.data.path) in sources
