"""Benchmarks through lm-evaluation-harness: opened once, asked of every stage of a chain, compared in pairs.

Every stage sees the same documents with the same examples before them, so that two stages are compared document by
document: the mean of paired differences with its 95 % interval, which says more than two separate standard errors.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.evaluation.options import TaskOptions
from align.evaluation.own_tasks import is_own, require_no_code, rows_of
from data_prep.core.errors import UserError, nearest
from data_prep.options import DataOptions, SourceOptions
from data_prep.quality.contamination import Documents
from data_prep.records.mixing import sources_for
from data_prep.records.stream import Given, has_source, open_any
from data_prep.types import RowKind
from reward.metrics import Z95, paired_difference

if TYPE_CHECKING:
    from align.evaluation.harness_model import RoleModel

_SHOTS_SEED = 1234
"""The library's own seed of the examples before a document."""
_OFFLINE = ("ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectTimeout")
_READ_AS: Mapping[RowKind, Sequence[RowKind]] = {
    RowKind.conversations: (RowKind.conversations,),
    RowKind.preferences: (RowKind.preferences, RowKind.unpaired),
    RowKind.prompts: (RowKind.prompts,),
    RowKind.text: (RowKind.text,),
}
_ROWS = 1000
"""Rows that are held at a time."""
_NAMED = 10
"""How many documents that stand in rows are named."""


@dataclass
class TaskScores:
    """One stage's numbers on one task."""

    values: dict[str, float | None]
    """Metric -> value over all documents; None where it is not finite."""
    each: dict[str, dict[int, float]]
    """Metric -> document -> value; only metrics that are a mean over documents, and only finite values."""


class Tasks:
    """The tasks of an evaluation, with their documents.

    Raises:
        UserError: one is not there, needs the network where there is none, or would run code.
    """

    def __init__(self, options: TaskOptions, allow_code: bool) -> None:
        from lm_eval.tasks import TaskManager

        require_no_code(options, allow_code)
        self._options = options
        manager = TaskManager(include_defaults=not all(map(is_own, options.tasks)))
        self._loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in options.tasks:
            with _explained(name, manager.all_tasks):
                found = manager.load([_config_of(Path(name).expanduser()) if is_own(name) else name])
            for part in self._loaded:
                self._loaded[part].update(found.get(part) or {})
        for name, task in self._loaded["tasks"].items():
            _require_safe(name, task)
            shots = task.get_config("num_fewshot")
            if options.task_shots is not None and shots != 0:  # 0 in a task is meant
                shots = options.task_shots
            task.set_config(key="num_fewshot", value=shots or 0)

    def measure(self, model: RoleModel) -> dict[str, TaskScores]:
        """A stage's numbers on every task, and on groups of them."""
        from lm_eval.evaluator import evaluate

        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=_SHOTS_SEED)
        answer = evaluate(
            model,
            self._loaded,
            limit=self._options.task_limit,
            bootstrap_iters=0,
            apply_chat_template=self._options.task_chat,
            fewshot_as_multiturn=self._options.task_chat,
        )
        samples = answer["samples"]
        numbers = {**answer["results"], **answer.get("groups", {})}
        return {name: TaskScores(_values(row), _each(samples.get(name, ()))) for name, row in numbers.items()}

    def about(self, name: str) -> dict[str, Any]:
        """What is said of a task beside its numbers."""
        task = self._loaded["tasks"].get(name)
        if task is None:
            return {"group": sorted(self._loaded["group_map"].get(name, ()))}
        return {"version": task.VERSION, "shots": task.get_config("num_fewshot"), "chat": self._options.task_chat}

    def rises(self, name: str, metric: str) -> bool:
        """Whether more of a metric is better."""
        task = self._loaded["tasks"].get(name)
        wanted = task.higher_is_better() if task is not None else {}
        return bool((wanted or {}).get(metric.partition(",")[0], True))

    def documents(self) -> dict[str, list[str]]:
        """Task -> the text of every document, as the model is asked it, without examples."""
        limit = self._options.task_limit
        found = {}
        for name, task in self._loaded["tasks"].items():
            found[name] = [_asked(task, doc) for _, doc in task.doc_iterator(limit=limit)]
        return found


def _asked(task: Any, doc: Any) -> str:
    """What a document asks; where the choices are the texts that differ, all of them."""
    asked = task.doc_to_text(doc)
    return asked if isinstance(asked, str) else "\n".join(map(str, task.doc_to_choice(doc)))


def compared(tasks: Tasks, stages: Mapping[str, Mapping[str, TaskScores]]) -> dict[str, Any]:
    """The `tasks` of result.json: every stage's numbers, and the last stage's against those of each before it."""
    *before, last = stages
    result: dict[str, Any] = {}
    for name, scores in stages[last].items():
        metrics = {}
        for metric in scores.values:
            rises = tasks.rises(name, metric)
            own = scores.each.get(metric)
            metrics[metric] = {
                "higher_is_better": rises,
                "stages": {stage: found[name].values.get(metric) for stage, found in stages.items()},
                "changes": {
                    stage: change
                    for stage in before
                    if own and (change := _change(own, stages[stage][name].each.get(metric, {}), rises)) is not None
                },
            }
        count = {"n": max(map(len, scores.each.values()))} if scores.each else {}
        result[name] = {**count, **tasks.about(name), "metrics": metrics}
    return result


def contaminated(documents: Mapping[str, Sequence[str]], data: DataOptions, seed: int) -> dict[str, dict[str, Any]]:
    """Task -> how many of its documents stand in the rows of the data that do not evaluate, and the first of them."""
    looked = {name: Documents(texts) for name, texts in documents.items()}
    count = 0
    for stream in _streams(data, seed):
        rows = list(islice(stream, _ROWS))
        while rows:
            training = [row for row in rows if row.meta.get("split") != "eval"]
            count += len(training)
            for each in looked.values():
                each.look_through(training)
            rows = list(islice(stream, _ROWS))
    return {
        name: {
            "documents": len(documents[name]),
            "found": len(each.found),
            "rows": count,
            "first": [{"document": at, "row": each.found[at]} for at in sorted(each.found)[:_NAMED]],
        }
        for name, each in looked.items()
    }


def _streams(data: DataOptions, seed: int) -> Iterator[Iterator[Any]]:
    """The records of every source of the data, each source once."""
    for kind, kinds in _READ_AS.items():
        if has_source(data, kind.name):
            for one in sources_for(data, kind):
                yield iter(open_any(one.given, kinds, seed))
    if data.path:
        yield iter(open_any(Given(data, SourceOptions(path=data.path)), seed=seed))


def _change(own: Mapping[int, float], before: Mapping[int, float], rises: bool) -> dict[str, Any] | None:
    """The paired change over the documents of both, with its 95 % interval and what it says."""
    both = sorted(own.keys() & before.keys())
    if len(both) < 2:
        return None
    mean, error = paired_difference([own[at] for at in both], [before[at] for at in both])
    low, high = mean - Z95 * error, mean + Z95 * error
    better, worse = (low > 0, high < 0) if rises else (high < 0, low > 0)
    verdict = "better" if better else "worse" if worse else "unclear"
    return {"value": mean, "low": low, "high": high, "n": len(both), "verdict": verdict}


def _values(row: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of a task by metric; the library's own errors are left out, `none` is no filter."""
    numbers = {key: value for key, value in row.items() if "," in key and "_stderr," not in key}
    return {
        key.removesuffix(",none"): float(value) if math.isfinite(value) else None
        for key, value in numbers.items()
        if isinstance(value, int | float)
    }


def _each(samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Metric -> document -> value, where a document has one number."""
    found: dict[str, dict[int, float]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            value, kind = sample[metric], sample["filter"]
            if isinstance(value, int | float) and math.isfinite(value):
                named = metric if kind == "none" else f"{metric},{kind}"
                found.setdefault(named, {})[int(sample["doc_id"])] = float(value)
    return found


def _config_of(path: Path) -> dict[str, Any]:
    """A task file with what it includes, its local rows by their full paths."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config: dict[str, Any] = load_yaml(path)
    if rows := rows_of(path):
        named = {split: [str(file) for file in files] for split, files in rows.items()}
        config["dataset_kwargs"] = {**config.get("dataset_kwargs", {}), "data_files": named}
    return config


def _require_safe(name: str, task: Any) -> None:
    """Refuse tasks that would run what a model writes."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"the task {name} runs code that models write, which is not done here", code="unsafe_task",
            hint="leave it out, or use lm_eval itself on an export: align export TARGET",
        )  # fmt: skip
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"the task {name} asks about pictures or sound", code="unsafe_task", hint="leave it out")


@contextmanager
def _explained(name: str, known: Sequence[str]) -> Iterator[None]:
    """Whatever goes wrong while a task is opened, as one line that says what to do."""
    loggers = logging.getLogger("lm_eval")
    level = loggers.level
    loggers.setLevel(logging.ERROR)
    try:
        yield
    except UserError:
        raise
    except Exception as problem:
        kinds = {kind.__name__ for one in _causes(problem) for kind in type(one).__mro__}
        if kinds & set(_OFFLINE):
            raise UserError(
                f"the task {name} needs its documents from the network, which cannot be reached ({problem})",
                code="no_network",
                hint="open it once with a network (HF_HUB_OFFLINE=0), or take a task file of your own with local rows",
            ) from problem
        if not is_own(name) and name not in known:
            near = nearest(name, known)
            hint = (
                f"did you mean '{near}'?" if near else "lm_eval ls tasks lists them; a file of your own ends in .yaml"
            )
            raise UserError(f"there is no task '{name}'", code="unknown_task", hint=hint) from problem
        said = f"the task {name} cannot be opened ({type(problem).__name__}: {problem})"
        raise UserError(said, code="bad_task") from problem
    finally:
        loggers.setLevel(level)


def _causes(problem: BaseException | None) -> Iterator[BaseException]:
    while problem is not None:
        yield problem
        problem = problem.__cause__ or problem.__context__
