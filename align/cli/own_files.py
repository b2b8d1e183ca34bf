"""Files as words of `align run` and `align check`: what their rows are says which data and which pipeline are meant.

align run talk.jsonl                    data=files data.conversations.path=talk.jsonl pipeline=sft
align run talk.jsonl pairs.jsonl        ... data.preferences.path=pairs.jsonl pipeline=rlhf
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from shlex import quote
from typing import TYPE_CHECKING

from data_prep.core.errors import UserError
from data_prep.types import CONVERSATION, DOCUMENT, PREFERENCE, PROMPT, UNPAIRED, RowKind

if TYPE_CHECKING:
    from data_prep.records.stream import Given

_PIPELINES = {
    frozenset({CONVERSATION}): "sft",
    frozenset({CONVERSATION, PREFERENCE}): "rlhf",
    frozenset({CONVERSATION, PREFERENCE, PROMPT}): "rlhf",
    frozenset({CONVERSATION, UNPAIRED}): "sft_kto",
    frozenset({DOCUMENT}): "pretrain",
}
"""What is trained on rows of these kinds, where nothing else can be meant."""
_ENDING = re.compile(r"\.(jsonl|json|csv|tsv|parquet|arrow|txt)(\.(gz|bz2|xz|zst))?$", re.IGNORECASE)
"""How the name of a file of rows ends."""
_CHOICES = {
    PREFERENCE: "pairs alone train several things: add pipeline=reward_model, pipeline=dpo or pipeline=orpo, or a file "
    "of conversations for the whole chain",
    UNPAIRED: "labelled replies alone are for KTO on a model that talks: add pipeline=kto, or a file of conversations",
    PROMPT: "prompts alone have nothing to learn from: add pipeline=ppo with stages.ppo.init and stages.ppo.reward, or "
    "a file of conversations",
}


def with_files(words: Sequence[str]) -> list[str]:
    """The words of a command, files among them replaced by the overrides that they stand for.

    Raises:
        UserError: a file that cannot be read, two of one kind, or files that do not say what is to be trained.
    """
    files = [word for word in words if "=" not in word and os.path.isfile(os.path.expanduser(word))]
    rest = [word for word in words if word not in files]
    for word in rest:
        _check_is_no_path(word)
    if not files:
        return rest
    found: dict[str, tuple[str, RowKind]] = {}
    meant = _meant(rest) if len(files) == 1 else None
    for file in files:
        kind = meant or _kind_of(file)
        if kind.option in found:
            raise UserError(
                f"two files of {kind.name}: {found[kind.option][0]} and {file}",
                code="two_files",
                hint=f"put them into one folder and name that, data.{kind.option}.path=FOLDER, or mix them: "
                f"data.{kind.option}.mix",
            )
        found[kind.option] = file, kind
        _check_is_alone(file, kind, rest)
    said = [] if _given(rest, "data") else ["data=files"]
    said += [f"data.{option}.path={os.path.expanduser(file)}" for option, (file, _) in found.items()]
    if not _given(rest, "pipeline") and not _given(rest, "experiment"):
        said.append(f"pipeline={_pipeline({kind: file for file, kind in found.values()})}")
    print(f"read as: {' '.join(said)}", file=sys.stderr)
    return [*said, *rest]


def _meant(words: Sequence[str]) -> RowKind | None:
    """What the rows of a file are where the words say how such rows, of one kind alone, are read."""
    options = [word.partition("=")[0].split(".") for word in words if word.startswith("data.")]
    named = {path[1] for path in options if len(path) > 2}
    named -= {path[1] for path in options if path[2:3] in (["path"], ["mix"], ["generator"])}
    kinds = [kind for kind in RowKind if kind.option == kind.name and kind.name in named]
    return kinds[0] if len(kinds) == 1 else None


def _check_is_alone(file: str, kind: RowKind, words: Sequence[str]) -> None:
    """No word gives another source for the rows of a file: one of both would be read, and the other not.

    Raises:
        UserError: one does.
    """
    own = {f"data.{kind.option}.{name}" for name in ("path", "generator", "mix")} | {"data.mix"}
    for word in words:
        key = word.partition("=")[0].lstrip("+")
        if key in own or key.startswith((f"data.{kind.option}.mix.", "data.mix.")):
            raise UserError(
                f"'{file}' and {key} both give {kind.option}", code="two_sources", hint="leave one of them out"
            )


def _check_is_no_path(word: str) -> None:
    """A word that is no override is not a folder either, nor a file of data that is not there.

    Raises:
        UserError: it is; with the option that names folders, or the nearest file.
    """
    path = os.path.expanduser(word)
    if "=" in word:
        return
    if os.path.isdir(path):
        raise UserError(
            f"'{word}' is a folder, and words are files", code="bad_override", hint=f"data=files data.path={word}"
        )
    if _ENDING.search(path):
        _kind_of(path)


def _kind_of(file: str) -> RowKind:
    """What the rows of a file are."""
    from data_prep.records.stream import open_any

    return open_any(_source(file)).kind


def _source(file: str, option: str = "") -> Given:
    from data_prep.options import DataOptions, SourceOptions
    from data_prep.records.stream import Given

    path = os.path.expanduser(file)
    return Given(DataOptions(path=path), SourceOptions(path=path), option=option)


def _pipeline(files: Mapping[RowKind, str]) -> str:
    """What is trained on files of these kinds."""
    kinds = frozenset(files)
    if known := _PIPELINES.get(kinds):
        return known
    named = " and ".join(sorted(kind.name for kind in kinds))
    hint = "say which: pipeline=NAME (align ls recipes)"
    if len(kinds) == 1:
        (kind,) = kinds
        hint = _CHOICES.get(kind, hint)
        hint = (kind == PROMPT and _answers(files[kind])) or hint
    elif PROMPT in kinds:
        hint = _pairs(files[PROMPT]) or hint
    raise UserError(f"files of {named} do not say what is to be trained", code="which_pipeline", hint=hint)


def _answers(file: str) -> str | None:
    """How rows that are read as prompts are made dialogues, where a column beside them may be the answer."""
    named = _columns(file, CONVERSATION, "completion")
    return named and f"where they are answered, {named}; {_CHOICES[PROMPT]}"


def _pairs(file: str) -> str | None:
    """How rows that are read as prompts beside dialogues are made pairs, where two columns may be their replies."""
    named = _columns(file, PREFERENCE, "rejected")
    instead = f"pipeline=rlhf data.preferences.path={quote(file)} in the place of the file"
    return named and f"{file} is read as prompts; where two of its columns are replies, {instead}, and {named}"


def _columns(file: str, kind: RowKind, wanted: str) -> str | None:
    """The hint that names the columns of a file so that it is read as a kind, the column `wanted` among them."""
    from data_prep.records.stream import open_stream

    try:
        open_stream(_source(file, f"data.{kind.option}."), kind, 0)
    except UserError as problem:
        if f"{wanted}: " in (problem.hint or ""):
            return problem.hint
    return None


def _given(words: Sequence[str], key: str) -> bool:
    return any(word.partition("=")[0] == key for word in words)
