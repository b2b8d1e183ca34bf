"""The report of a run: one HTML page that needs nothing but itself.

Every number on it comes from the files of the run folder, found through `run.json`; a part whose files are not there
(the pipeline does not have it, the run failed before it) is left out, and a file that cannot be read is named. Each
section is made in a file of its own, `report_*.py`; docs/report.md says which part comes from which file. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from align.report.benchmarks import benchmarks
from align.report.checks import checks, integrity, tally
from align.report.conclusion import compared, figures, verdict
from align.report.curves import curves
from align.report.evaluation import Texts, has_gold, judge, own_samples, replies, scores
from align.report.formatting import duration, fixed, number, percent, plural, signed, size, visible
from align.report.lineage import chain
from align.report.notices import failures, notices, told
from align.report.run_facts import again, costs, data
from align.report.run_files import Json, StageFiles, mapping, read_json, read_recipe, read_stages
from data_prep.core.errors import UserError
from data_prep.core.files import write_text

MOST_BYTES = 1_000_000
BUDGETS = (250_000, 40_000, 0)
"""Bytes of folded text a page may hold; the next is taken when the page would pass MOST_BYTES."""


def write_report(run_dir: Path | str) -> Path:
    """Write `report.html` into a run folder, from its files alone, and return its path.

    Raises:
        UserError: there is no readable run.json.
    """
    return reported(run_dir)[0]


def reported(run_dir: Path | str) -> tuple[Path, list[Json]]:
    """Write `report.html`; returns its path, and what it says is worth a second look: the run's warnings.

    Raises:
        UserError: there is no readable run.json.
    """
    folder = Path(run_dir)
    run, stages, notes = _read(folder)
    page, warnings = b"", list[Json]()
    for budget in BUDGETS:
        page, warnings = _page(folder, run, stages, list(notes), budget)
        if len(page) < MOST_BYTES:
            break
    path = folder / "report.html"
    write_text(path, page.decode())
    return path, warnings


def conclusion(run_dir: Path) -> Json:
    """What the report says first, of a run folder: {tone, headline, sentences}."""
    run, stages, _ = _read(Path(run_dir))
    stages, _ = current(run, stages)
    measured = _measured(stages)
    return verdict(run, stages, measured, compared(measured), _waiting(_recipe(Path(run_dir)), stages))


def _read(folder: Path) -> tuple[Json, list[StageFiles], list[str]]:
    notes: list[str] = []
    run = read_json(folder / "run.json", notes)
    if not run:
        raise UserError(notes[0] if notes else "no run.json here", code="no_run", file=str(folder))
    return run, read_stages(folder, run, notes), notes


def current(run: Json, stages: Sequence[StageFiles]) -> tuple[list[StageFiles], list[str]]:
    """The stages of this run, and the names of those that an earlier run of the folder left.

    A run that is not done has nothing behind the stage it failed in or is at: what lies there stands on other parents.
    """
    if run.get("status") == "done":
        return list(stages), []
    end = next((i + 1 for i, stage in enumerate(stages) if stage.status != "done"), len(stages))
    return list(stages[:end]), [stage.name for stage in stages[end:]]


def _measured(stages: Sequence[StageFiles]) -> StageFiles:
    """The stage that left an evaluation; an empty one where none did."""
    return next((s for s in reversed(stages) if mapping(s.result.get("stages"))), StageFiles("", {}))


def _recipe(folder: Path) -> Json:
    """The run's resolved recipe."""
    return read_recipe(folder / "recipe.yaml", [])


def _waiting(recipe: Json, stages: Sequence[StageFiles]) -> list[str]:
    """Stages of the recipe that have left nothing yet."""
    planned = mapping(recipe.get("stages"))
    return [str(name) for name in planned if name not in {s.name for s in stages}]


def _page(
    folder: Path, run: Json, stages: Sequence[StageFiles], notes: list[str], budget: int
) -> tuple[bytes, list[Json]]:
    sections = contents(folder, run, stages, notes, budget)
    page = bytes(_template().render(run=run, **sections, notes=notes).encode("utf-8", "replace"))
    return page, sections["notices"]


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    words = (number, fixed, signed, percent, size, duration, plural, told)
    environment.filters.update({word.__name__: word for word in words})
    return environment.get_template("report.html.jinja")


def contents(folder: Path, run: Json, stages: Sequence[StageFiles], notes: list[str], budget: int) -> Json:
    """Everything the page shows, section by section. A section that fails on damaged files is noted and left out."""

    def part(name: str, make: Callable[..., Any], *given: Any, otherwise: Any = None) -> Any:
        try:
            return make(*given)
        except Exception as problem:  # files of unknown shape: the rest of the page still says what there is
            notes.append(f"{name}: {type(problem).__name__}: {problem}")
            return otherwise

    stages, earlier = current(run, stages)
    measured, texts = _measured(stages), Texts(budget)
    recipe = _recipe(folder)
    waiting = _waiting(recipe, stages)
    gain = part("comparison", compared, measured)
    unknown = {"tone": "plain", "headline": f"Status: {run.get('status')}.", "sentences": []}
    shown = part("replies", replies, measured, gain, texts, otherwise={"groups": [], "count": 0})
    listed = [(s.name, found) for s in stages if (found := part("checks", checks, s, stages))]
    matrix = part("integrity", integrity, stages, otherwise={"names": [], "rows": []})
    samples = [(s.name, found) for s in stages if (found := part("samples", own_samples, s, texts))]
    return {
        "verdict": part("verdict", verdict, run, stages, measured, gain, waiting, otherwise=unknown),
        "notices": [
            *part("failed checks", failures, matrix, listed, otherwise=[]),
            *part("notices", notices, stages, measured, gain, earlier, otherwise=[]),
        ],
        "figures": part("figures", figures, stages, measured, gain, otherwise=[]),
        "chain": part("chain", chain, stages, waiting, mapping(recipe.get("model")), otherwise={"rows": []}),
        "curves": [found for s in stages if (found := part("curves", curves, s, budget > 0))],
        "scores": part("scores", scores, measured, otherwise={"stages": {}}),
        "benchmarks": part("benchmarks", benchmarks, measured, otherwise={}),
        "replies": {**shown, "gold": has_gold(shown["groups"])},
        "samples": samples,
        "judge": part("reward model", judge, stages, measured, otherwise={}),
        "checks": {"matrix": matrix, "listed": listed, "tally": tally(matrix, listed)},
        "data": part("data", data, stages, otherwise=[]),
        "costs": part("time and memory", costs, stages, otherwise={"rows": []}),
        "again": part("command", again, folder, run, otherwise={"command": "", "versions": {}}),
    }
