"""What a format is, how it is found from the keys of the rows, and the field checks that all formats share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

from data_prep.errors import UserError, nearest, unknown
from data_prep.registry import Registry
from data_prep.sources import Row, _kind, _short
from data_prep.types import ROLES, Conversation, Document, Message, Preference, Prompt

CONVERSATION, PREFERENCE, PROMPT, DOCUMENT = "conversation", "preference", "prompt", "document"
Record = TypeVar("Record")
FORMATS: Registry[type[Format]]


class Format:
    """Rows of one shape. Subclasses implement `detect` and one parse function per kind that they yield.

    Args:
        options: the format's own options, checked against `option_help`.
        seed: for formats that draw (which style answers, which pairs are flipped).

    Attributes:
        kinds: which of "conversation", "preference", "prompt", "document" the rows yield.
        columns: the columns that it looks for, to offer the nearest when no format fits.
        option_help: option name -> what it does.
        notes: what was changed on the way, counted; goes into the data card.

    Raises:
        UserError: an unknown option.
    """

    name: ClassVar[str] = ""
    kinds: ClassVar[tuple[str, ...]] = ()
    columns: ClassVar[tuple[str, ...]] = ()
    option_help: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __init__(self, options: dict[str, Any] | None = None, seed: int = 0) -> None:
        self.options = dict(options or {})
        self.seed = seed
        self.notes: Counter[str] = Counter()
        for key in self.options:
            if key not in self.option_help:
                raise unknown(f"option of the format {self.name}", key, self.option_help)

    @classmethod
    def detect(cls, keys: frozenset[str]) -> bool:
        """Whether rows with these keys are of this format. At most one format of a kind may say yes."""
        raise NotImplementedError

    # One row to one record; each raises UserError (row.problem) for a row that cannot be used.
    def conversation(self, row: Row) -> Conversation:
        """A row as a dialogue to imitate."""
        raise NotImplementedError

    def preference(self, row: Row) -> Preference:
        """A row as two replies, the better first."""
        raise NotImplementedError

    def document(self, row: Row) -> Document:
        """A row as plain text."""
        raise NotImplementedError

    def prompt(self, row: Row) -> Prompt:
        """A row as something to reply to; by default what stands before the last reply."""
        if PREFERENCE in self.kinds and CONVERSATION not in self.kinds:
            pair = self.preference(row)
            return Prompt(pair.prompt, pair.id, pair.meta)
        talk = self.conversation(row)
        last = max(place for place, message in enumerate(talk.messages) if message.role == "assistant")
        if not last:
            raise row.problem(None, "there is nothing before the assistant's turn to use as a prompt")
        return Prompt(talk.messages[:last], talk.id, talk.meta)

    # All rows at once; formats that make several records of a row override these.
    def conversations(self, rows: Sequence[Row]) -> list[Conversation | UserError]:
        """Every row as a dialogue, or its error."""
        return _each(self.conversation, rows)

    def preferences(self, rows: Sequence[Row]) -> list[Preference | UserError]:
        """Every row as a preference, or its error."""
        return _each(self.preference, rows)

    def prompts(self, rows: Sequence[Row]) -> list[Prompt | UserError]:
        """Every row as a prompt, or its error."""
        return _each(self.prompt, rows)

    def documents(self, rows: Sequence[Row]) -> list[Document | UserError]:
        """Every row as a document, or its error."""
        return _each(self.document, rows)


FORMATS = Registry("format", "data_prep.formats")


def _each(parse: Callable[[Row], Record], rows: Sequence[Row]) -> list[Record | UserError]:
    result: list[Record | UserError] = []
    for row in rows:
        try:
            result.append(parse(row))
        except UserError as problem:
            if problem.row is None:  # the options are wrong, not this row
                raise
            result.append(problem)
    return result


def detect_format(keys: Iterable[str], kind: str, file: str | None = None) -> tuple[type[Format], str]:
    """The format whose rows have these keys and yield `kind`, and the evidence for the data card.

    Raises:
        UserError: none or several fit; says what was seen.
    """
    seen = frozenset(keys)
    shown = ", ".join(sorted(seen)) or "none"
    fitting = [(name, form) for name, form in FORMATS.items() if form.detect(seen)]
    useful = [(name, form) for name, form in fitting if kind in form.kinds]
    if len(useful) == 1:
        return useful[0][1], f"keys {shown}"
    if not useful and fitting:
        name, form = fitting[0]
        raise UserError(
            f"rows with the keys {shown} are of the format {name}, which yields {' and '.join(form.kinds)} rows "
            f"(expected {kind} rows)",
            code="format_kind",
            file=file,
        )
    if useful:
        names = ", ".join(name for name, _ in useful)
        raise UserError(f"the keys {shown} fit several formats: {names}", code="format", hint="set format", file=file)
    raise _no_format(seen, file)


def _no_format(seen: frozenset[str], file: str | None) -> UserError:
    """The error for keys that no format knows, with the nearest known column."""
    known = sorted({column for _, form in FORMATS.items() for column in form.columns})
    near = {key: nearest(key, known) for key in sorted(seen) if key not in known}
    guesses = ", ".join(f"'{guess}' for '{key}'" for key, guess in near.items() if guess and guess not in seen)
    guess = f"did you mean the column {guesses}? " if guesses else ""
    return UserError(
        f"no format knows rows with the keys {', '.join(sorted(seen)) or 'none'} "
        f"({guess}formats: {', '.join(FORMATS.names())})",
        code="unknown_format",
        hint="set format, or rename columns with columns={theirs: ours}",
        file=file,
    )


# ------------------------------------------------------------------------------------------------- field checks
def find_key(row: Row, names: Sequence[str]) -> str:
    """The first of `names` that the row has.

    Raises:
        UserError: none is there; the nearest existing key is offered.
    """
    for name in names:
        if row.data.get(name) is not None:
            return name
    here = [name for name in names if name in row.data]
    if here:
        raise row.problem(here[0], "is missing (got null; expected text)")
    near = next((key for key in (nearest(name, row.data) for name in names) if key and key not in names), None)
    guess = f"; did you mean the column '{near}'?" if near else ""
    raise row.problem(names[0], f"is missing (got the columns {', '.join(map(str, row.data)) or 'none'}{guess})")


def text_of(row: Row, field: str, value: Any, *, empty: bool = False) -> str:
    """`value` as text; white space alone counts as empty.

    Raises:
        UserError: not text, or empty where it may not be, or not encodable (a lone surrogate).
    """
    if not isinstance(value, str):
        got = _kind(value) if value is None or isinstance(value, bool) else f"{_kind(value)} {_short(str(value))}"
        raise row.problem(field, f"wrong type (got {got}; expected text)")
    if not empty and not value.strip():
        raise row.problem(field, f"empty (got {value!r}; expected text)", code="empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise row.problem(field, "half of a character (got a lone surrogate; expected valid Unicode)") from problem
    return value


def text_field(row: Row, *names: str, empty: bool = False) -> str:
    """The text of the first of these columns that the row has."""
    field = find_key(row, names)
    return text_of(row, field, row.data[field], empty=empty)


def optional_text(row: Row, *names: str) -> str:
    """The text of the first of these columns that the row has; "" when there is none."""
    for name in names:
        if row.data.get(name) is not None:
            return text_of(row, name, row.data[name], empty=True)
    return ""


def split_of(row: Row) -> dict[str, Any]:
    """{"split": "train" | "eval"} from the row's `split` column, or nothing."""
    value = row.data.get("split")
    if value is None or value == "":
        return {}
    names = {"train": "train", "eval": "eval", "validation": "eval", "valid": "eval", "dev": "eval", "test": "eval"}
    if value not in names:
        raise row.problem("split", f"unknown split (got {_short(str(value))!r}; expected train or eval)")
    return {"split": names[value]}


def content_of(row: Row, field: str, value: Any, *, empty: bool = False) -> str:
    """A message's content: text, or OpenAI's list of text parts."""
    if isinstance(value, list):
        parts = []
        for number, part in enumerate(value):
            if not isinstance(part, dict) or part.get("type") != "text":
                raise row.problem(f"{field}[{number}]", f"unknown part (got {_short(str(part))}; expected a text part)")
            parts.append(text_of(row, f"{field}[{number}].text", part.get("text"), empty=True))
        value = "".join(parts)
    return text_of(row, field, value, empty=empty)


def parse_messages(row: Row, field: str, value: Any, roles: dict[str, str] | None = None) -> tuple[Message, ...]:
    """A list of message objects as Messages.

    Args:
        row: for error messages.
        field: where the list stands.
        value: list of {"role", "content"} (or {"from", "value"}), with `train` or `weight` 0/1 where given.
        roles: their role name -> ours; None: ours only.

    Raises:
        UserError: not such a list; an unknown role comes with the nearest known one.
    """
    known = roles or {role: role for role in ROLES}
    if not isinstance(value, list):
        raise row.problem(field, f"wrong type (got {_kind(value)}; expected a list of messages)")
    if not value:
        raise row.problem(field, "empty (got no messages)", code="empty")
    messages: list[Message] = []
    for number, entry in enumerate(value):
        place = f"{field}[{number}]"
        if not isinstance(entry, dict):
            raise row.problem(place, f"wrong type (got {_kind(entry)}; expected an object with role and content)")
        messages.append(_parse_message(row, place, entry, known))
    return tuple(message for message in messages if message.content or message.role != "system")


def _parse_message(row: Row, place: str, entry: dict[str, Any], known: dict[str, str]) -> Message:
    role_key = "role" if "role" in entry or "from" not in entry else "from"
    text_key = "content" if "content" in entry or "value" not in entry else "value"
    role = entry.get(role_key)
    if role not in known:
        near = nearest(str(role), known)
        guess = f"did you mean '{near}'? " if near else ""
        raise row.problem(
            f"{place}.{role_key}",
            f"unknown role (got {role!r}; {guess}expected {', '.join(known)})",
            code="unknown_role",
        )
    if entry.get("tool_calls"):
        raise row.problem(f"{place}.tool_calls", "tool calls cannot be rendered yet (expected plain content)")
    ours = known[role]
    content = content_of(row, f"{place}.{text_key}", entry.get(text_key), empty=ours in ("system", "tool"))
    return Message(ours, content, _train_flag(row, place, entry))


def _train_flag(row: Row, place: str, entry: dict[str, Any]) -> bool | None:
    """`train` (true or false) or OpenAI's `weight` (0 or 1)."""
    for key, allowed in (("train", (True, False)), ("weight", (0, 1))):
        value = entry.get(key)
        if value is None:
            continue
        if value not in allowed or (key == "train" and not isinstance(value, bool)):
            expected = "true or false" if key == "train" else "0 or 1"
            raise row.problem(f"{place}.{key}", f"wrong value (got {_short(str(value))}; expected {expected})")
        return bool(value)
    return None


def need_reply(row: Row, field: str, messages: tuple[Message, ...]) -> None:
    """Refuse a conversation without a supervised assistant turn.

    Raises:
        UserError: there is none.
    """
    if not any(message.role == "assistant" and message.train is not False for message in messages):
        raise row.problem(
            field, "nothing to train on (expected an assistant turn without train: false)", code="no_reply"
        )


def need_question(row: Row, field: str, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages, if there is something to reply to.

    Raises:
        UserError: there are none, or the last is the assistant's.
    """
    if not messages or messages[-1].role == "assistant":
        last = "an assistant turn" if messages else "no message"
        raise row.problem(field, f"nothing to reply to (got {last} at the end; expected a user turn)")
    return messages


def number_field(row: Row, field: str) -> float | None:
    """A finite number, or None when the column is missing or null."""
    value = row.data.get(field)
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if isinstance(value, bool) or number != number or number in (float("inf"), float("-inf")):
        raise row.problem(field, f"wrong type (got {_short(str(value))}; expected a number)")
    return number
