"""The rows of a run as `align check` looks at them: counts, problems, and the first rows token by token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from align.models.fingerprint import read_model_config
from align.models.resolve import open_renderer
from align.planning.findings import Findings
from align.training.data import Reading, ids_of, reading_of, remarks_of
from data_prep.core.errors import UserError
from data_prep.options import DataOptions, OnBadRow, OnLong
from data_prep.prepare.arrow_rows import lengths_of
from data_prep.quality.card_warnings import card_warnings
from data_prep.records.left_out import JOINT
from data_prep.records.stream import has_source
from data_prep.types import LabelledTokens, PairTokens, RowKind, Tokens

if TYPE_CHECKING:
    from pathlib import Path

    from align.checkpoints.compatibility import StagePlan
    from align.config.schema import RunConfig, StageSpec
    from data_prep.prepare.prepare import Prepared

SHOWN_ROWS = 2


@dataclass
class _Read:
    """One kind of data as one or more stages read it."""

    key: tuple[Any, ...]
    """What decides the rows."""
    prepared: Prepared[Any] | None
    """None where there are none to be had."""
    entry: dict[str, Any]


@dataclass
class Shelf:
    """What has been read: stages that read the same rows in the same way share them."""

    found: Findings
    known: list[_Read] = field(default_factory=list)

    def read(self, reading: Reading, kind: str) -> int | None:
        """Read one kind of data of a stage into the findings; returns its number of training rows."""
        stage = reading.spec.name
        try:
            key = (kind, reading.spec.data, reading.lengths(kind))
        except UserError as problem:
            self.found.add(stage, [problem])
            return None
        known = next((each for each in self.known if each.key == key), None)
        if known is None:
            known = _Read(key, *self._fresh(reading, kind))
            self.known.append(known)
            if known.entry:
                self.found.data[kind if kind not in self.found.data else f"{kind} of {stage}"] = known.entry
        if known.entry:
            known.entry["stages"].append(stage)
        if known.prepared is None:
            return None
        try:
            reading.require_fit(kind, known.prepared)
        except UserError as problem:
            self.found.add(stage, [problem])
        if kind in reading.spec.stage.reads:
            doubts = reading.spec.stage.doubts_of_rows(known.prepared.train)
            self.found.add(stage, [*doubts, *_over_budget(reading.spec, known.prepared.train)], "warning")
        return len(known.prepared.train)

    def rows(self, reading: Reading, kind: str) -> Prepared[Any]:
        """The rows of a kind of data of a stage: those that were read before, else read now.

        Raises:
            UserError: as `Reading.rows`.
        """
        key = (kind, reading.spec.data, reading.lengths(kind))
        known = next((each.prepared for each in self.known if each.key == key and each.prepared is not None), None)
        if known is None:
            known = reading.rows(kind)
            self.known.append(_Read(key, known, {}))
        return known

    def _fresh(self, reading: Reading, kind: str) -> tuple[Prepared[Any] | None, dict[str, Any]]:
        """(the rows, the entry of the data), read as far as they can be."""
        stage = reading.spec.name
        prepared, problems = read_on(reading, kind)
        self.found.add(stage, problems)
        if prepared is None:
            return None, {}
        dropped = prepared.card["rows"]["dropped"].get("too_long", 0)
        if dropped and not any(problem.code == "too_long" for problem in problems):
            self.found.add(stage, _too_long(reading, kind), "warning")
        doubts = [UserError(text, code=code, hint=hint) for code, text, hint in card_warnings(prepared.card)]
        self.found.add(stage, [*remarks_of(prepared.card), *doubts], "warning")
        ends = end_share(prepared)
        if ends is not None and ends < 1:
            self.found.add(stage, [_ends(ends)], "error" if ends == 0 else "warning")
        first = [*prepared.train[:SHOWN_ROWS], *prepared.eval[:SHOWN_ROWS]][:SHOWN_ROWS]
        self.found.preview += [
            part for row in first for part in preview(row, kind, reading.renderer.tokenizer, reading.spec.name)
        ]
        entry = {"kind": kind, "stages": [], **prepared.card, "end_supervised_share": ends}
        return prepared, entry


def kinds_of(spec: StageSpec) -> list[str]:
    """The kinds of data that a stage reads: those that it needs, and of those that it may read what there is."""
    return [*spec.stage.reads, *(kind for kind in spec.stage.may_read if has_source(spec.data, kind))]


def require_rows(config: RunConfig, plans: Sequence[StagePlan[Any]], folder: Path) -> None:
    """Read all rows of these stages: what is wrong with them is said before an earlier stage has been trained.

    Where there are many, they are kept on disk as they are made, and the stages map what was read here.

    Args:
        folder: the base.

    Raises:
        UserError: a stage would stop at its rows.
    """
    renderer, model_config, shelf = open_renderer(folder), read_model_config(folder), Shelf(Findings())
    for plan in plans:
        reading = reading_of(plan, model_config, renderer, config.seed)
        for kind in kinds_of(plan.spec):
            reading.require_fit(kind, shelf.rows(reading, kind))


def read_on(reading: Reading, kind: str) -> tuple[Prepared[Any] | None, list[UserError]]:
    """The rows of one kind, and every problem on the way: bad rows are left out, then long ones, to see the rest."""
    problems: list[UserError] = []
    left_out: set[str] = set()
    while True:
        try:
            return reading.rows(kind), problems
        except UserError as problem:
            fault = {"too_long": "long", "left_out": f"left out {problem.field}"}.get(problem.code, "bad")
            if not (problems and problem.code == "no_rows"):  # all rows are among those complained of
                problems += [problem, *problem.others]
            if fault in left_out:
                return None, problems
            left_out.add(fault)
            if problem.code == "left_out":
                reading = _without_columns(reading, str(problem.field).split(JOINT))
            else:
                reading = _without_long(reading) if fault == "long" else _without_bad(reading)


def _without_long(reading: Reading) -> Reading:
    """The same reading, with over-long rows dropped however many they are."""
    stage = replace(reading.spec.stage, on_long=OnLong.drop, on_long_answer=None, max_lost=1.0)
    return replace(reading, spec=replace(reading.spec, stage=stage))


def _without_columns(reading: Reading, columns: list[str]) -> Reading:
    """The same reading, without columns that it would not leave out in silence."""
    data = replace(reading.spec.data, unused=[*reading.spec.data.unused, *columns])
    return replace(reading, spec=replace(reading.spec, data=data))


def _without_bad(reading: Reading) -> Reading:
    """The same reading, with bad rows dropped."""
    data: DataOptions = reading.spec.data

    def lenient(mix: dict[str, Any]) -> dict[str, Any]:
        drop = {"on_bad_row": OnBadRow.drop.value}
        return {name: {**source, **drop} if isinstance(source, dict) else source for name, source in mix.items()}

    each = {name: getattr(data, name) for name in {kind.option for kind in RowKind}}
    sources = {n: replace(one, on_bad_row=OnBadRow.drop, mix=lenient(one.mix)) for n, one in each.items()}
    return replace(reading, spec=replace(reading.spec, data=replace(data, mix=lenient(data.mix), **sources)))


def _too_long(reading: Reading, kind: str) -> list[UserError]:
    """Which rows are dropped for their length, said as the run would say it with on_long=error."""
    spec = _without_bad(reading).spec
    stage = replace(spec.stage, on_long=OnLong.error, on_long_answer=None)
    try:
        replace(reading, spec=replace(spec, stage=stage)).rows(kind)
    except UserError as problem:
        return [problem]
    return []


def _over_budget(spec: StageSpec, rows: Sequence[Any]) -> list[UserError]:
    """Rows that hold more tokens than a forward pass should."""
    budget = getattr(spec.stage, "micro_tokens", 0)
    if not budget:
        return []
    lengths = lengths_of(rows) + spec.stage.reply_tokens
    over = (lengths > budget).nonzero()[0]
    if not len(over):
        return []
    longest = int(lengths.argmax())
    return [
        UserError(
            f"{len(over)} of {len(rows)} rows have more than {budget} tokens (the longest, {rows[longest].id}, "
            f"{lengths[longest]}): each of them takes a forward pass of its own",
            field=f"stages.{spec.name}.micro_tokens",
            code="over_budget",
            hint=f"raise it, or lower stages.{spec.name}.max_length",
        )
    ]


def _ends(share: float) -> UserError:
    return UserError(
        "no row's end of turn is supervised: the model would not learn to stop"
        if share == 0
        else f"the end of turn is supervised in {100 * share:.1f}% of the rows",
        code="end_not_supervised",
        hint="the chat template must write its end token right after the assistant's content",
    )


def end_share(prepared: Prepared[Any]) -> float | None:
    """Share of rows whose end-of-turn token is supervised; None for rows without an assistant's turn."""
    return prepared.ended if prepared.card["kind"] in ("conversation", "preference", "unpaired") else None


def preview(row: Any, kind: str, tokenizer: Any, stage: str | None = None) -> list[dict[str, Any]]:
    """A row as the model sees it: token texts, ids and mask; one entry for each side of a pair."""
    parts: Iterable[tuple[str, list[int], list[bool]]]
    if isinstance(row, PairTokens):
        parts = [
            (side, [*row.prompt, *reply], [False] * len(row.prompt) + [True] * len(reply))
            for side, reply in (("chosen", row.chosen), ("rejected", row.rejected))
        ]
    elif isinstance(row, LabelledTokens):
        mask = [False] * len(row.prompt) + [True] * len(row.reply)
        parts = [("good reply" if row.good else "bad reply", [*row.prompt, *row.reply], mask)]
    elif isinstance(row, Tokens):
        parts = [("whole", row.ids, [False, *row.mask[1:]])]
    else:
        parts = [("whole", ids, [False] * len(ids)) for ids in ids_of(row)]
    head = {"kind": kind, **({"stage": stage} if stage else {}), "id": row.id}
    return [
        {**head, "part": part, "tokens": [token_text(tokenizer, token) for token in ids], "ids": ids, "mask": mask}
        for part, ids, mask in parts
    ]


def token_text(tokenizer: Any, token: int) -> str:
    """The text of one token; a piece of a character is shown by the tokenizer's own name for it."""
    text = str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    name = str(tokenizer.convert_ids_to_tokens(token))
    if not text or "\ufffd" in text:
        return name
    return f" {text}" if name.startswith("\u2581") and not text.startswith(" ") else text
