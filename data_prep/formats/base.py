"""What a format is: which columns it reads, and how one row becomes records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias, TypeVar

from data_prep.core.errors import UserError, unknown
from data_prep.core.registry import Registry
from data_prep.sources.rows import Row, Skip, short
from data_prep.types import (
    CONVERSATION,
    DOCUMENT,
    PREFERENCE,
    PROMPT,
    UNPAIRED,
    Conversation,
    Document,
    Labelled,
    Message,
    Preference,
    Prompt,
    RowKind,
)

Record = TypeVar("Record")
Several: TypeAlias = Record | Skip | list[Record | Skip | UserError]
"""What a row gives: a record, a reason why it gives none, or a list of these."""
Found: TypeAlias = Iterator[Record | UserError | Skip]
Spellings: TypeAlias = tuple[tuple[str, ...], ...]
FORMATS: Registry[type[Format]]


class Format:
    """Rows of one shape. Subclasses set `spellings` (or `uses`) and implement one function per kind that they yield.

    Args:
        options: the format's own options, checked against `option_help`.
        seed: for formats that draw (which style answers, which pairs are flipped).

    Attributes:
        kinds: which of "conversation", "preference", "prompt", "unpaired", "document" the rows yield.
        spellings: sets of columns; rows that have all columns of one of them are of this format.
        extras: further columns that it reads where they are.
        option_help: option name -> what it does.
        writes: the kind of record that `written` turns into a row; "": it writes none.
        whole: its rows hold whole dialogues as messages, so that columns of their parts only repeat them.
        by_name: it is used where the options name it, and never found from columns.
        judged: its rows are people's judgements: data cards and lineage name their files by digest.
        notes: what was changed on the way, counted; goes into the data card.

    Raises:
        UserError: an unknown option.
    """

    name: ClassVar[str] = ""
    kinds: ClassVar[tuple[RowKind, ...]] = ()
    spellings: ClassVar[Spellings] = ()
    extras: ClassVar[tuple[str, ...]] = ()
    option_help: ClassVar[Mapping[str, str]] = MappingProxyType({})
    writes: ClassVar[str] = ""
    by_name: ClassVar[bool] = False
    judged: ClassVar[bool] = False
    whole: ClassVar[bool] = False

    def __init__(self, options: dict[str, Any] | None = None, seed: int = 0) -> None:
        self.options = dict(options or {})
        self.seed = seed
        self.notes: Counter[str] = Counter()
        for key in self.options:
            if key not in self.option_help:
                raise unknown(f"option of the format {self.name}", key, self.option_help)

    @classmethod
    def uses(cls, keys: frozenset[str]) -> frozenset[str]:
        """The columns that it would read of rows with these keys; none if they are not of this format."""
        fitting = next((spelling for spelling in cls.spellings if keys.issuperset(spelling)), ())
        return keys.intersection((*fitting, *cls.extras)) if fitting else frozenset()

    @classmethod
    def reads(cls, keys: frozenset[str], kind: str) -> frozenset[str]:
        """The columns that decide a record of this kind, of rows with these keys that are of this format."""
        named = {column for spelling in cls.spellings for column in spelling}
        return cls.uses(keys) or keys.intersection({*named, *cls.extras})

    @classmethod
    def doubt(cls, rows: Sequence[Mapping[str, Any]], kind: str, options: Mapping[str, Any]) -> UserError | None:
        """Why rows with the columns of this format are none of it after all, if they are not.

        It is said to the user where it has a hint and no other format fits.
        """
        return None

    def choice(self, option: str, *choices: str) -> str:
        """The value of an option that names one of `choices`; the first is the default.

        Raises:
            UserError: another value; the nearest is offered.
        """
        value = self.options.get(option, choices[0])
        if value not in choices:
            raise unknown(f"value of options.{option}", str(value), choices)
        return str(value)

    # One row to what it gives; each raises UserError (row.problem) for a row that cannot be used.
    def conversation(self, row: Row) -> Several[Conversation]:
        """A row as a dialogue to imitate."""
        raise NotImplementedError

    def preference(self, row: Row) -> Several[Preference]:
        """A row as two replies, the better first."""
        raise NotImplementedError

    def labelled(self, row: Row) -> Several[Labelled]:
        """A row as one reply and whether it is good."""
        raise NotImplementedError

    def document(self, row: Row) -> Several[Document]:
        """A row as plain text."""
        raise NotImplementedError

    def written(self, record: Any) -> dict[str, Any]:
        """The row that is read as this record of the kind `writes`, as far as the format can say it."""
        raise NotImplementedError

    def prompt(self, row: Row) -> Several[Prompt]:
        """A row as something to reply to; by default what stands before the last reply."""
        found: Any = self.conversation(row) if CONVERSATION in self.kinds else self.preference(row)
        if isinstance(found, list):
            return [_prompt_of(row, item) for item in found]
        one: Several[Prompt] = _prompt_of(row, found)
        return one

    # All rows; formats that need several rows for one record override these.
    def conversations(self, rows: Iterable[Row]) -> Found[Conversation]:
        """Every row as a dialogue, or its error."""
        return each(self.conversation, rows)

    def preferences(self, rows: Iterable[Row]) -> Found[Preference]:
        """Every row as a preference, or its error."""
        return each(self.preference, rows)

    def unpaired(self, rows: Iterable[Row]) -> Found[Labelled]:
        """Every row as a labelled reply, or its error."""
        return each(self.labelled, rows)

    def prompts(self, rows: Iterable[Row]) -> Found[Prompt]:
        """Every row as a prompt, or its error."""
        return each(self.prompt, rows)

    def documents(self, rows: Iterable[Row]) -> Found[Document]:
        """Every row as a document, or its error."""
        return each(self.document, rows)

    def records(self, kind: RowKind, rows: Iterable[Row]) -> Found[Any]:
        """The records of one kind, in the order of the rows."""
        parse: Callable[[Iterable[Row]], Found[Any]] = getattr(self, _ALL_ROWS[kind])
        return parse(rows)

    @classmethod
    def yields(cls, kind: RowKind) -> bool:
        """Whether rows give records of a kind; pairs of replies may be read as labelled replies."""
        return kind in cls.kinds or (kind is UNPAIRED and PREFERENCE in cls.kinds)

    @classmethod
    def row_by_row(cls, kind: RowKind) -> bool:
        """Whether every row gives its records of this kind by itself, whatever the other rows are."""
        own, shared = getattr(cls, _ALL_ROWS[kind]), getattr(Format, _ALL_ROWS[kind])
        return bool(own is shared)


_ALL_ROWS = {
    CONVERSATION: "conversations",
    PREFERENCE: "preferences",
    UNPAIRED: "unpaired",
    PROMPT: "prompts",
    DOCUMENT: "documents",
}
"""Kind of record -> the method that reads all rows."""
FORMATS = Registry("format", "data_prep.formats")


def each(parse: Callable[[Row], Several[Record]], rows: Iterable[Row]) -> Found[Record]:
    """What every row gives, or its error, one after another.

    Raises:
        UserError: the options are wrong, not a row.
    """
    for row in rows:
        try:
            found = parse(row)
        except UserError as problem:
            if problem.row is None:
                raise
            yield problem
        except RecursionError:
            yield row.problem(None, "is nested too deeply (got more levels than can be read; expected a flat row)")
        else:
            if isinstance(found, list):
                yield from found
            else:
                yield found


def _prompt_of(row: Row, record: Any) -> Any:
    if not isinstance(record, Conversation):
        return Prompt(record.prompt, record.id, record.meta, record.tools) if hasattr(record, "prompt") else record
    last = max(place for place, message in enumerate(record.messages) if message.role == "assistant")
    if not last:
        raise row.problem(None, "nothing to reply to (got nothing before the assistant's turn; expected a user turn)")
    return Prompt(record.messages[:last], record.id, record.meta, record.tools)


def pair(
    row: Row, prompt: tuple[Message, ...], chosen: str, rejected: str, suffix: str = "", **more: Any
) -> Preference:
    """A preference of this row; `more` are further fields of Preference.

    Raises:
        UserError: both sides say the same.
    """
    if chosen.strip() == rejected.strip():
        raise row.problem(
            "rejected",
            f"the same as chosen (got {short(chosen)!r} twice; expected two different replies)",
            code="identical_pair",
        )
    return Preference(prompt, chosen, rejected, row.id + suffix, **more)
