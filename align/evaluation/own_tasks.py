"""Task files of one's own: the YAML files, what they include, and the rows that they read. No torch, no lm_eval."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from align.evaluation.options import TaskOptions
from data_prep.core.errors import UserError
from data_prep.core.hashing import file_sha256

PACKAGE = "lm_eval"
CODE = "!function"
"""The YAML tag by which a task file names a function of a Python file beside it."""


def is_own(task: str) -> bool:
    """Whether a task is a file, and no name of the library."""
    return task.endswith((".yaml", ".yml")) or "/" in task


def task_refusals(options: TaskOptions, where: str) -> Iterator[UserError]:
    """Why the tasks cannot be measured, as far as is known before anything is loaded; `where` is `stages.NAME`."""
    if not options.tasks:
        return
    if find_spec(PACKAGE) is None:
        yield UserError(
            f"tasks need the package {PACKAGE}",
            field=f"{where}.tasks",
            code="missing_extra",
            hint="in the clone: pip install -e '.[eval]' -c constraints.txt",
        )
    for task in filter(is_own, options.tasks):
        try:
            _texts(Path(task).expanduser())
        except UserError as problem:
            yield problem


def require_no_code(options: TaskOptions, allow_code: bool) -> None:
    """Functions beside task files run only where the run allows it; nothing of them is imported before.

    Raises:
        UserError: a file names one, and code is not allowed.
    """
    for task in [] if allow_code else filter(is_own, options.tasks):
        for path, text in _texts(Path(task).expanduser()).items():
            if CODE in text:
                raise UserError(
                    f"names a function ({CODE}), which would run as code of yours",
                    file=str(path),
                    code="code_not_allowed",
                    hint="set allow_code=true if you trust it, or write the task without it",
                )


def contents(options: TaskOptions) -> list[str]:
    """Hashes of the task files, of the local rows that they read, and of the code beside those that name functions."""
    found: list[Path] = []
    for path in (Path(task).expanduser() for task in options.tasks if is_own(task)):
        texts = _texts(path)
        found += texts
        found += [file for files in rows_of(path).values() for file in files]
        found += [code for file, text in texts.items() if CODE in text for code in sorted(file.parent.glob("*.py"))]
    return [file_sha256(file) for file in found]


def rows_of(path: Path) -> dict[str, list[Path]]:
    """Split -> local files of rows that a task file names; what is no file here is left to the library."""
    found: dict[str, list[Path]] = {}
    for file, text in reversed(_texts(path).items()):
        content = _plain(yaml.compose(text, Loader=yaml.SafeLoader))
        named = (content.get("dataset_kwargs") or {}).get("data_files")
        for split, files in (named if isinstance(named, dict) else {"train": named} if named else {}).items():
            listed = files if isinstance(files, list) else [files]
            places = [_beside(file, str(one)) for one in listed]
            if all(one.is_file() for one in places):
                found[split] = places
    return found


def _beside(file: Path, name: str) -> Path:
    """A path in a task file counts from the file's own folder, or else from the working folder."""
    own = file.parent / Path(name).expanduser()
    return (own if own.is_file() else Path(name).expanduser()).resolve()


def _texts(path: Path, seen: tuple[Path, ...] = ()) -> dict[Path, str]:
    """A task file and all that it includes -> their texts.

    Raises:
        UserError: a file is missing, or no YAML mapping.
    """
    if not path.is_file():
        raise UserError("there is no such task file", file=str(path), code="no_file")
    if path.resolve() in seen:
        raise UserError("includes itself", file=str(path), code="bad_task")
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise UserError(f"is no YAML ({problem})", file=str(path), code="bad_task") from problem
    content = _plain(node)
    if not isinstance(content, dict) or not {"task", "group", "include"} & set(content):
        raise UserError("is no task: it has no `task: NAME`", file=str(path), code="bad_task")
    found = {path: text}
    included = content.get("include") or []
    for one in included if isinstance(included, list) else [included]:
        found |= _texts(path.parent / str(one), (*seen, path.resolve()))
    return found


def _plain(node: Any) -> Any:
    """A YAML node as lists, mappings and texts; tags are not followed."""
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): _plain(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(each) for each in node.value]
    return node.value if node is not None else None
