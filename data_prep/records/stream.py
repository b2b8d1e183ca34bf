"""From source options to records: which source serves a kind of row, its rows, its format, its content hash."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from data_prep.core.errors import UserError, nearest, unknown
from data_prep.core.hashing import file_sha256
from data_prep.formats.base import FORMATS, Format
from data_prep.formats.detection import detect_format
from data_prep.options import DataOptions, OnBadRow, SourceOptions
from data_prep.quality.missing_words import note_missing
from data_prep.quality.template_marks import note_marks
from data_prep.records.filter import Filtering, make_filters
from data_prep.records.keep import Condition, kept
from data_prep.records.left_out import LeftOut
from data_prep.records.negatives import Negatives, negatives_of
from data_prep.records.tally import Tally
from data_prep.sources.column_mapping import made_from, mapped
from data_prep.sources.files import find_files, is_hub_id, read_path, resolve
from data_prep.sources.generated import generated_rows
from data_prep.sources.rows import Row, RowOrProblem, Skip
from data_prep.sources.splits import SplitWish
from data_prep.types import CONVERSATION, DOCUMENT, PREFERENCE, PROMPT, UNPAIRED, Labelled, RowKind

VERSION = 4  # raise it when the same files and options give other rows
_KEY_ROWS = 50
_NO_FORMAT = ("format_kind", "unknown_format", "format")
"""Codes of the errors that no, or no one format fits."""
_OPTION = re.compile(r"(?<![\w.])(columns|format|parse)=")
"""Options of a source as formats name them."""
_FALLBACKS = {PROMPT: (CONVERSATION, PREFERENCE)}


@dataclass(frozen=True)
class Given:
    """The source that serves one kind of row, with the data options it belongs to."""

    data: DataOptions
    source: SourceOptions
    where: str = ""
    """The option of a mixture that serves, `data.mix` or `data.KIND.mix`."""
    option: str = ""
    """What stands before the names of its options in a run: `data.conversations.`."""

    @property
    def mix(self) -> dict[str, Any]:
        """The sources of a mixture, by name; {} for a single source."""
        return dict(self.data.mix if self.where == "data.mix" else self.source.mix)

    def files(self) -> list[str]:
        """The files of a single source that lie on this machine."""
        paths = [resolve(path, self.data.root) for path in (self.source.path, self.source.eval_path) if path]
        return [file for path in paths if os.path.exists(path) or not is_hub_id(path) for file in find_files(path)]

    @property
    def remote(self) -> bool:
        """Whether some of it comes from the hub."""
        paths = [path for path in (self.source.path, self.source.eval_path) if path]
        return any(not os.path.exists(resolve(path, self.data.root)) and is_hub_id(path) for path in paths)

    def wish(self, kind: RowKind | None, eval_path: str | None = None) -> SplitWish:
        """Which split is read where there are several: of the source, or of its `eval_path`."""
        return SplitWish(kind, side="eval") if eval_path else SplitWish(kind, self.source.split, self.option)

    @property
    def label(self) -> str:
        """What to call the source in cards and errors."""
        if self.mix:
            return self.where
        if self.source.generator:
            return f"generator {self.source.generator}"
        return resolve(str(self.source.path), self.data.root)


def source_for(data: DataOptions, kind: RowKind) -> Given:
    """The source for rows of a kind.

    Prompts fall back on conversations, then preferences; any kind falls back on `data.path`, where prompts are read
    with the options (format, columns, ...) of conversations or preferences unless they have their own.

    Raises:
        UserError: nothing is given for this kind, or both a path and a generator.
    """
    kind = RowKind(kind)
    for name in (kind, *_FALLBACKS.get(kind, ())):
        source: SourceOptions = getattr(data, name.option)
        if source.mix and (source.path or source.generator):
            raise UserError(
                f"data.{name.option} has both a mix and a {'path' if source.path else 'generator'}",
                code="two_sources",
                hint="give one of them",
            )
        if source.mix:
            return Given(data, source, f"data.{name.option}.mix")
        if source.path and source.generator:
            raise UserError(
                f"data.{name.option} has both a path ({source.path}) and a generator ({source.generator})",
                code="two_sources",
                hint="give one of them; data=files has no generator of its own",
            )
        if source.path or source.generator:
            return Given(data, source, option=f"data.{name.option}.")
    if data.path and data.mix:
        raise UserError("data has both a path and a mix", code="two_sources", hint="give one of them")
    if data.mix:
        return Given(data, getattr(data, kind.option), "data.mix")
    if data.path:
        names = [name.option for name in (kind, *_FALLBACKS.get(kind, ()))]
        name = next((name for name in names if getattr(data, name) != SourceOptions()), names[0])
        return Given(data, replace(getattr(data, name), path=data.path), option=f"data.{name}.")
    hint = f"set data.{kind.option}.path=FILE (or .generator=NAME)"
    if paths := [path for other in RowKind if (path := getattr(data, other.option).path)]:
        hint = f"data.{kind.option}.path={paths[0]} reads its rows as such, or says what they lack"
    raise UserError(f"data '{data.name}' has no {kind.option}", code="no_source", hint=hint)


def _split_options(source: SourceOptions, form: type[Format] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the generator's options, the format's): a key that the format knows is the format's."""
    if not source.generator:
        return {}, dict(source.options)
    known = form.option_help if form else {key for _, f in FORMATS.items() for key in f.option_help}
    return (
        {key: value for key, value in source.options.items() if key not in known},
        {key: value for key, value in source.options.items() if key in known},
    )


def _raw(given: Given, kind: RowKind | None, path: str | None, wish: SplitWish) -> Iterable[RowOrProblem]:
    source = given.source
    if path is None and source.generator:
        form = None if source.format == "auto" else FORMATS.get(source.format)
        options = _split_options(source, form)[0]
        try:
            return generated_rows(source.generator, options, kind)
        except UserError:
            for key in options:
                if form and nearest(key, form.option_help):
                    raise unknown(f"option of the format {form.name}", key, form.option_help) from None
            raise
    return read_path(path or str(source.path), given.data.root, wish)


def _rows(
    given: Given, kind: RowKind | None, path: str | None, tally: Tally, wish: SplitWish | None = None
) -> Iterator[Row]:
    """Rows that could be read, one by one; those that could not are counted as bad.

    Raises:
        UserError: nothing can be read at all.
    """
    source, data = given.source, given.data
    wish = wish or given.wish(kind, path)
    raw = mapped(iter(_raw(given, kind, path, wish)), source.columns, source.parse)
    rows = _readable(raw, None if path else source.limit, tally)
    if data.unused:
        rows = (_without(row, frozenset(data.unused)) for row in rows)
    if not data.keep:
        yield from rows
        return

    def drop(row: Row, why: str | UserError) -> None:
        tally.seen += 1
        if isinstance(why, UserError):
            tally.bad(why)
        else:
            tally.dropped["not_kept"] += 1

    conditions = [Condition(column, wanted) for column, wanted in data.keep.items()]
    yield from kept(rows, conditions, drop, None if ".mix." in given.option else given.label)


def _readable(raw: Iterator[RowOrProblem], limit: int | None, tally: Tally) -> Iterator[Row]:
    """The first rows, without those that could not be read; these are counted as bad."""
    read = 0
    try:
        for row in islice(raw, limit):
            read += 1
            tally.source_rows += 1
            if isinstance(row, UserError):
                tally.seen += 1
                tally.bad(row)
            else:
                yield row
    except UserError as problem:
        if not read:
            raise
        tally.broken(problem)


def _without(row: Row, columns: frozenset[str]) -> Row:
    """The row without columns that are to be left out."""
    if columns.isdisjoint(row.data):
        return row
    return Row(row.file, row.row, {name: value for name, value in row.data.items() if name not in columns})


def source_rows(data: DataOptions, source: SourceOptions) -> list[dict[str, Any]]:
    """The rows of any source as plain dicts (for a rule's table).

    Raises:
        UserError: the source cannot be read, or has bad rows that are not to be dropped.
    """
    tally = Tally()
    rows = [row.data for row in _rows(Given(data, source), None, None, tally)]
    tally.check_bad_rows(source.on_bad_row)
    return rows


def _format_of(rows: Sequence[Row], source: SourceOptions, kind: RowKind, label: str) -> tuple[type[Format], str]:
    if source.format != "auto":
        form = FORMATS.get(source.format)
        if not form.yields(kind):
            raise UserError(
                f"the format {source.format} yields {' and '.join(form.kinds)} rows (expected {kind} rows)",
                code="format_kind",
                file=label,
            )
        return form, "set in the options"
    keys = {str(key) for row in rows for key in row.data}
    return detect_format(keys, kind, label, [row.data for row in rows], source.options)


def check_options(given: Given, kind: RowKind) -> None:
    """Refuse, before anything is read, filters and formats that do not fit and options that they do not have.

    Raises:
        UserError: of the format only where it is set; what `auto` finds is known only when rows are read.
    """
    make_filters(given.data.filters)
    serves_pairs = kind in (PREFERENCE, UNPAIRED) or (kind == PROMPT and given.option.startswith("data.preferences."))
    if negatives_of(given.source, given.option) and not serves_pairs:
        raise _no_pairs(given, kind, "set data.preferences.negatives")
    if given.source.split and given.source.generator:
        raise UserError("is not read: a generator has no splits", field=f"{given.option}split", code="not_read")
    if given.source.format != "auto":
        form, _ = _format_of((), given.source, kind, given.label)
        form(_split_options(given.source, form)[1], 0)
        if given.source.generator and _split_options(given.source, form)[0]:
            for _ in _raw(given, kind, None, given.wish(kind)):  # a generator looks at its options when it begins
                break


def _no_pairs(given: Given, kind: RowKind, hint: str) -> UserError:
    said = f"is not read: negatives are made of pairs of replies, and these are {kind} rows"
    return UserError(said, field=f"{given.option}negatives", code="not_read", hint=hint)


@dataclass
class Stream:
    """The records of a source, one by one: parsed, filtered, and counted in `tally`. It can be read once.

    Rows of `eval_path` come last, with `meta["split"] == "eval"`, and the others then with "train". Bad rows are only
    counted, also where a file breaks off (`tally.check_whole`).
    """

    given: Given
    kind: RowKind
    form: Format
    evidence: str
    """Why the format is this one."""
    rows: Iterable[Row]
    tally: Tally
    filtering: Filtering
    left_out: LeftOut
    """What the format leaves out of these rows although it matters."""
    negatives: Negatives | None
    read_as: RowKind
    """The kind of record that the rows are read as: pairs where labelled replies are asked of a format of pairs."""

    def __iter__(self) -> Iterator[Any]:
        return self._halves() if self.read_as != self.kind else self._whole()

    def _halves(self) -> Iterator[Labelled]:
        """Every pair as a good reply and a bad one, named after it; the margin between them is left behind."""
        for one in self._whole():
            self.tally.seen += 1
            for side, reply, good in (("chosen", one.chosen, True), ("rejected", one.rejected, False)):
                yield Labelled(one.prompt, reply, good, f"{one.id}#{side}", dict(one.meta), one.tools)

    def _whole(self) -> Iterator[Any]:
        """The records of the rows, and the negatives that are made of them."""
        if self.negatives is None:
            yield from self._given()
            return
        yield from self.negatives.through(self._given())
        self.tally.seen += sum(self.negatives.made.values())

    def _given(self) -> Iterator[Any]:
        """The records of the rows themselves."""
        records = _parsed(self.form, self.read_as, self.rows, self.tally)
        if self.given.source.eval_path:
            records = chain(_on_side("train", records), _on_side("eval", self._held()))
        for record in self.filtering.through(records):
            if isinstance(record, Skip):
                self.tally.dropped[record.reason] += 1
            else:
                note_marks(record, self.form.notes)
                note_missing(record, self.form.notes)
                yield record

    def _held(self) -> Iterator[Any]:
        """The records of `eval_path`, by the format of the other rows, or their own where they lack its columns."""
        source, path = self.given.source, str(self.given.source.eval_path)
        rows = _rows(self.given, self.kind, path, self.tally)
        first = list(islice(rows, _KEY_ROWS))
        form = self.form
        if source.format == "auto" and not form.uses(frozenset(str(key) for row in first for key in row.data)):
            try:
                chosen, evidence = _format_of(first, source, self.read_as, path)
            except UserError as problem:
                if problem.code not in _NO_FORMAT:
                    raise
            else:
                form = chosen(_known_options(_split_options(source, chosen)[1], chosen), form.seed)
                self.evidence += f"; of eval_path {chosen.name} ({evidence})"
        left_out = _left_out(self.given, type(form), self.read_as)
        yield from _parsed(form, self.read_as, left_out.watch(chain(first, rows)), self.tally)
        self.left_out.take(left_out)
        if form is not self.form:
            self.form.notes += form.notes

    def check_left_out(self) -> None:
        """Refuse rows, of those that were read so far, that would lose what their answers may depend on.

        Raises:
            UserError: names the columns, and what to do.
        """
        if (problem := self.left_out.problem(self.given.label)) is not None:
            raise problem

    def check_first(self, count: int = _KEY_ROWS) -> None:
        """Refuse the stream by its first rows; it is used up. A bad one has all read, so that each is named at once.

        Raises:
            UserError: one of the first rows is bad and is not to be dropped, or loses what answers may depend on.
        """
        self.check_left_out()
        on_bad_row = self.given.source.on_bad_row
        if on_bad_row is OnBadRow.drop or not type(self.form).row_by_row(self.read_as):
            return
        rows = iter(self.rows)
        deque(_parsed(self.form, self.read_as, islice(rows, count), self.tally), maxlen=0)
        if self.tally.bad_rows:
            deque(_parsed(self.form, self.read_as, rows, self.tally), maxlen=0)
        self.tally.check_bad_rows(on_bad_row)

    def foreign(self) -> bool:
        """Whether code from outside this package has a say: a format or a filter of a plugin."""
        own = "data_prep."
        return not all(type(each).__module__.startswith(own) for each in (self.form, *self.filtering.filters))

    def about(self) -> dict[str, Any]:
        """What the data card says of the source, after it was read."""
        return {
            "kind": self.kind,
            "format": self.form.name,
            "evidence": self.evidence,
            "source_rows": self.tally.source_rows,
            "notes": dict(self.form.notes),
            "filters": self.filtering.card(),
            **({"negatives": self.negatives.card()} if self.negatives else {}),
            **({"labels": {file: file_sha256(Path(file)) for file in self.given.files()}} if self.form.judged else {}),
            **({"left_out": left_out} if (left_out := self.left_out.card(self.given.label)) else {}),
        }


def open_stream(given: Given, kind: RowKind, seed: int) -> Stream:
    """The records of a source, its format found from the first rows.

    Raises:
        UserError: nothing can be read at all, no format fits, or a filter's options are wrong.
    """
    tally = Tally(option=given.option + "on_bad_row")
    source = given.source
    wish = given.wish(kind)
    rows = _rows(given, kind, None, tally, wish)
    first = list(islice(rows, _KEY_ROWS))
    if not first:
        tally.check_bad_rows(source.on_bad_row)
        if tally.dropped["not_kept"]:
            said = f"no row meets the conditions ({tally.dropped['not_kept']} of {tally.seen} do not)"
            raise UserError(said, code="no_rows", file=given.label, field="data.keep")
        raise UserError(f"no row could be read of {tally.seen}", code="no_rows", file=given.label)
    try:
        chosen, evidence = _format_of(first, source, kind, given.label)
    except UserError as problem:
        problem.hint = _OPTION.sub(rf"{given.option}\1=", problem.hint or "") or None  # as a run calls them
        raise
    evidence += f"; {wish.said}" if wish.said else ""
    options = _split_options(source, chosen)[1]
    form = chosen(_known_options(options, chosen) if kind == PROMPT else options, seed)
    read_as = kind if kind in form.kinds else PREFERENCE
    left_out = _left_out(given, chosen, read_as)
    seen = list(left_out.watch(first))
    shares = negatives_of(source, given.option) if kind in (PREFERENCE, UNPAIRED) else {}
    if shares and read_as != PREFERENCE:
        raise _no_pairs(given, kind, f"leave {given.option}negatives out, or give pairs")
    negatives = Negatives(shares, source, seed) if shares else None
    filtering = Filtering(make_filters(given.data.filters, read_as), given.data.root)
    rows = chain(seen, left_out.watch(rows))
    return Stream(given, kind, form, evidence, rows, tally, filtering, left_out, negatives, read_as)


def _left_out(given: Given, form: type[Format], kind: RowKind) -> LeftOut:
    """What counts the columns that a format leaves out of the rows of a source."""
    source = given.source
    return LeftOut(form, kind, made_from(source.columns, source.parse), source.columns, given.option)


def _known_options(options: dict[str, Any], form: type[Format]) -> dict[str, Any]:
    """The options without those of other formats, where rows are read by another one than the options were set for."""
    others = {name for _, other in FORMATS.items() for name in other.option_help} - set(form.option_help)
    return {name: value for name, value in options.items() if name not in others}


def _on_side(side: str, records: Iterable[Any]) -> Iterator[Any]:
    """Records that ask for a side."""
    for record in records:
        record.meta["split"] = side
        yield record


def _parsed(form: Format, kind: RowKind, rows: Iterable[Row], tally: Tally) -> Iterator[Any]:
    """The records of rows; bad ones and skipped ones are counted."""
    for record in form.records(kind, rows):
        tally.seen += 1
        if isinstance(record, UserError):
            tally.bad(record)
        elif isinstance(record, Skip):
            tally.dropped[record.reason] += 1
        else:
            yield record


def has_source(data: DataOptions, kind: str) -> bool:
    """Whether a source is given for a kind of row ("conversations", "preferences", "prompts" or "text") itself."""
    source: SourceOptions = getattr(data, RowKind[kind].option)
    return bool(source.path or source.generator or source.mix)


KINDS = (CONVERSATION, PREFERENCE, UNPAIRED, DOCUMENT, PROMPT)
"""The order in which a file is tried that nothing is said of."""


def open_any(given: Given, kinds: Sequence[RowKind] = KINDS, seed: int = 0) -> Stream:
    """The records of a source as the first kind of `kinds` that its format yields; with all kinds, the format's own.

    Raises:
        UserError: nothing can be read, or no format knows the rows.
    """
    if given.source.format != "auto":
        form = FORMATS.get(given.source.format)
        kinds = [kind for kind in (form.kinds if tuple(kinds) == KINDS else kinds) if kind in form.kinds] or kinds
    problems: list[UserError] = []
    for kind in kinds:
        try:
            stream = open_stream(given, kind, seed)
        except UserError as problem:
            if problem.code not in (*_NO_FORMAT, "splits"):
                raise
            problems.append(problem)
            continue
        own = stream.form.kinds[0]
        tried = kinds[: kinds.index(kind)]
        return stream if own in (kind, *tried) or tuple(kinds) != KINDS else open_stream(given, own, seed)
    raise next((problem for problem in problems if problem.code == "format"), problems[0])


def checked(stream: Stream) -> Iterator[Any]:
    """The records of a stream that is to be read whole.

    Raises:
        UserError: after the last one, if the file broke off or has bad rows that are not to be dropped.
    """
    yield from stream
    stream.tally.check_whole()
    stream.tally.check_bad_rows(stream.given.source.on_bad_row)
