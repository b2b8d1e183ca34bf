"""What a format leaves out of rows although it changes what they mean: context, another answer, grades of the row.

Rows are looked at on their way to the format. A column is told by its name (`formats/column_roles.py`) and judged by
what stands in it: one that is empty, that says what is read anyway (a `prompt` beside `messages`), or that spells the
whole row once more (a rendered `text`) is no loss. Of a name that says nothing, long texts are said: they may well be
what a question is about.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from data_prep.core.errors import UserError
from data_prep.formats.base import Format
from data_prep.formats.column_roles import (
    ANSWER,
    BETTER,
    CONTEXT,
    GRADE,
    LONG_CONTEXT,
    OTHER,
    QUESTION,
    THOUGHT,
    WORSE,
    role_of,
)
from data_prep.formats.detection import detect_format
from data_prep.sources.rows import Row
from data_prep.types import CONVERSATION, DOCUMENT, PREFERENCE, PROMPT, UNPAIRED

_LONG = 80
"""Characters from which a story, a description and the like is what a question is about, not the name of it."""
_SHORT = 60
"""Most characters of a grade in words."""
_PLAIN = 20
"""Characters from which a text that stands in another does so on purpose."""
_NOTHING = frozenset(("", "none", "null", "nan", "n/a", "na", "-", "<noinput>", "no input", "[]", "{}"))
_ANSWERS = (ANSWER, BETTER)
_DIALOGUE = (QUESTION, ANSWER, BETTER, WORSE)
"""What makes a text beside it a part of a dialogue: a document leaves it out at any length, not without a word."""
JOINT = ", "
"""What stands between the columns that a complaint names."""
_STOPS: Mapping[str, tuple[str, ...]] = {
    CONVERSATION: (QUESTION, CONTEXT, LONG_CONTEXT, ANSWER, BETTER),
    PREFERENCE: (QUESTION, CONTEXT, LONG_CONTEXT),
    UNPAIRED: (QUESTION, CONTEXT, LONG_CONTEXT, ANSWER, BETTER),
    PROMPT: (QUESTION, CONTEXT, LONG_CONTEXT),
    DOCUMENT: (),
}
"""Kind of record -> the roles of columns that may not be left out of it in silence."""
_SAID: Mapping[str, tuple[str, ...]] = {
    CONVERSATION: (GRADE, THOUGHT, OTHER),
    PREFERENCE: (GRADE, OTHER),
    UNPAIRED: (GRADE, OTHER),
    DOCUMENT: (GRADE, OTHER, *_DIALOGUE),
}
"""Kind of record -> the roles of columns whose leaving out is only said."""


class LeftOut:
    """Counts the columns of rows that a format does not read although they matter.

    Args:
        form: the format.
        kind: the kind of record it reads the rows as.
        made_from: columns that the recipe has read already (`columns`, `parse`).
        named: columns that the recipe has made: a question, or an answer, that was named is not asked for again.
        option: what stands before the names of the source's options: `data.conversations.`, or nothing.

    Attributes:
        stops: column -> rows where it matters and is left out; such rows may not train in silence.
        said: column -> rows with a grade or a thought that is not used; 1 where a long text of another name is not.
    """

    def __init__(
        self,
        form: type[Format],
        kind: str,
        made_from: Iterable[str] = (),
        named: Iterable[str] = (),
        option: str = "",
    ) -> None:
        self._form, self._kind = form, kind
        self._columns = f"{option}columns"
        self._unused, self._keep = ("data.unused", "data.keep") if option else ("unused", "keep")
        self._made_from = frozenset(made_from)
        self._named = frozenset(named)
        self._known: dict[frozenset[str], tuple[list[tuple[str, str]], list[str]]] = {}
        self.rows = 0
        self.stops: Counter[str] = Counter()
        self.said: Counter[str] = Counter()
        self._grades: dict[str, Any] = {}
        self._shown: dict[str, Mapping[str, Any]] = {}

    def watch(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The same rows, looked at."""
        for row in rows:
            self.look(row.data)
            yield row

    def look(self, data: Mapping[str, Any]) -> None:
        """Look at one row."""
        self.rows += 1
        keys = frozenset(data)
        if keys not in self._known:
            self._known[keys] = self._left(keys)
        left, used = self._known[keys]
        for name, role in left:
            if role in (GRADE, THOUGHT):
                said = _graded(data[name]) if role == GRADE else not _is_nothing(data[name])
                self.said[name] += said
                if said and name not in self._grades:
                    self._grades[name] = data[name]
            elif role == OTHER or self._kind == DOCUMENT:
                if not self.said[name] and _characters(data[name]) >= (_LONG if role == OTHER else 1):
                    self.said[name] += not _is_said(data[name], data, used, OTHER)
            elif not _is_nothing(data[name]) and not (role == LONG_CONTEXT and _characters(data[name]) < _LONG):
                lost = not _is_said(data[name], data, used, role)
                self.stops[name] += lost
                if lost and name not in self._shown:
                    self._shown[name] = data

    def _left(self, keys: frozenset[str]) -> tuple[list[tuple[str, str]], list[str]]:
        """((column, its role) of what is left out, the columns that are read) of rows with these keys."""
        names = frozenset(str(key) for key in keys)
        used = self._form.reads(names, self._kind) | (self._made_from & names)
        excused = {role_of(name) for name in self._named & used}.intersection((QUESTION, *_ANSWERS))
        excused.update(_ANSWERS if excused.intersection(_ANSWERS) else ())
        found = []
        for name in sorted(names - used):
            role = role_of(name)
            wanted = role in _STOPS[self._kind] and role not in excused
            if role is not None and (wanted or role in _SAID.get(self._kind, ())):
                found.append((name, role))
        return found, sorted(used)

    def take(self, other: LeftOut) -> None:
        """Add what another look has found."""
        self.rows += other.rows
        self.stops += other.stops
        self.said += other.said
        self._grades = other._grades | self._grades
        self._shown = other._shown | self._shown

    def card(self, file: str) -> list[dict[str, Any]]:
        """What is wrong and what is only said, for the data card."""
        problem = self.problem(file)
        return [one.as_dict() for one in ([problem] if problem else []) + self.warnings(file)]

    def problem(self, file: str) -> UserError | None:
        """Why such rows may not train as they are, if they may not."""
        names = [name for name, count in self.stops.items() if count]
        if not names:
            return None
        are, them = ("are", "them") if len(names) > 1 else ("is", "it")
        context = [name for name in names if role_of(name) not in _ANSWERS]
        if not context:
            what, instead = "may be the answer as well", self._train_on(names[0])
        elif _MEDIA.search(names[0]):
            what, instead = f"{are} left out, as models here read text alone", "take such rows out, or "
        else:
            what, instead = f"{are} left out, though answers may depend on {them}", self._put_in(context)
        return UserError(
            f"{what} (in {max(self.stops.values()):,} of {self.rows:,} rows looked at)",
            code="left_out",
            hint=f"{instead}{self._unused}=[{','.join(names)}] leaves {them} out",
            file=file,
            field=JOINT.join(names),
        )

    def _train_on(self, name: str) -> str:
        """How to train on another answer: by its name, or without the dialogue that goes before it; or nothing."""
        used = self._known[frozenset(self._shown[name])][1]
        if not self._form.whole:
            own = next((one for one in used if role_of(one) in _ANSWERS), "completion")
            return f"{self._columns}={{{own}: {name}}} names the one to train on, or "
        data = {key: value for key, value in self._shown[name].items() if not isinstance(value, list)}
        lists = ",".join(one for one in used if one not in data)
        try:
            form, _ = detect_format(data, CONVERSATION, rows=[data])
        except UserError:
            return ""
        reads_it = lists and name in form.reads(frozenset(data), CONVERSATION)
        return f"{self._unused}=[{lists}] reads it in their place, or " if reads_it else ""

    def _put_in(self, names: Sequence[str]) -> str:
        """How to put columns (none of an answer) into the prompt, or nothing where no option of ours can."""
        shown = self._shown[names[0]]
        read = [name for name in self._known[frozenset(shown)][1] if isinstance(shown[name], str)]
        asked = [name for role in (QUESTION, CONTEXT) for name in read if role_of(name) == role and name not in _LISTS]
        fields = [_field(name, self._shown[name][name]) for name in names] + asked[:1]
        if not asked and "system" in self._form.extras and "system" not in shown:
            asked = ["system"]
        if not asked or None in fields:
            return ""
        made = "\\n\\n".join(f"{{{field}}}" for field in fields)
        return f'{self._columns}={{{asked[0]}: "{made}"}} puts {"them" if names[1:] else "it"} into the prompt, or '

    def warnings(self, file: str) -> list[UserError]:
        """What is only said: grades and thoughts that are not used, long texts under names that say nothing."""
        said = [name for name, count in self.said.items() if count]
        others = [name for name in said if role_of(name) in (OTHER, *_DIALOGUE)]
        names = [name for name in said if name not in others]
        return [
            *([self._unused_grades(file, names)] if names else []),
            *([self._unread(file, others)] if others else []),
        ]

    def _unused_grades(self, file: str, names: Sequence[str]) -> UserError:
        graded = next((name for name in names if role_of(name) == GRADE), None)
        is_not, them = ("are not used", "them") if len(names) > 1 else ("is not used", "it")
        return UserError(
            f"{is_not}: all rows are read alike" if graded else f"{is_not}: replies are read without {them}",
            code="grades_unused" if graded else "thoughts_unused",
            hint=f"{self._keep}={{{graded}: {_condition(self._grades[graded])} keeps rows by it" if graded else None,
            file=file,
            field=JOINT.join(names),
        )

    def _unread(self, file: str, names: Sequence[str]) -> UserError:
        hold, them = ("hold", "them") if len(names) > 1 else ("holds", "it")
        place, effect = ("prompt", f"says that no answer depends on {them}")
        if self._kind == DOCUMENT:
            place, effect = ("text", f"leaves {them} out")
        return UserError(
            f"{hold} {'long ' * all(role_of(name) == OTHER for name in names)}text that is not read",
            code="texts_unread",
            hint=f"{self._columns} can put {them} into the {place}; {self._unused}=[{','.join(names)}] {effect}",
            file=file,
            field=JOINT.join(names),
        )


_LISTS = ("tools", "functions", "history")
"""Columns that are read as lists, also where a text spells one."""
_MEDIA = re.compile(r"image|img|picture|photo|audio|video|speech|pixel", re.IGNORECASE)


def _is_nothing(value: Any) -> bool:
    """Whether a value says nothing: null, blank, an empty list, or a word for nothing."""
    if isinstance(value, str):
        return value.strip().lower() in _NOTHING
    if isinstance(value, Mapping):
        return all(_is_nothing(one) for one in value.values())
    if isinstance(value, Sequence):
        return all(_is_nothing(one) for one in value)
    return value is None or value != value


def _graded(value: Any) -> bool:
    """Whether a value can be a grade: a number, a truth value, or a word or two."""
    if isinstance(value, str):
        return 0 < len(value.strip()) <= _SHORT and not _is_nothing(value)
    return isinstance(value, bool | int | float) and value == value


def _condition(grade: Any) -> str:
    """The end of a `keep` that grades like this one can be held against."""
    if isinstance(grade, bool):
        return "true} (or false)"
    return f"{json.dumps(grade.strip(), ensure_ascii=False)}}}" if isinstance(grade, str) else '">=4"} (or a value)'


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for name, one in value.items() if name not in ("role", "from") for text in _texts(one))
    elif isinstance(value, Sequence):
        yield from (text for one in value for text in _texts(one))


def _field(name: str, value: Any) -> str | None:
    """What a template of columns calls a value; of an object that it can write one part of, that part."""
    if isinstance(value, Mapping):
        parts = [part for part, one in value.items() if _field(part, one) == part]
        return f"{name}.{parts[0]}" if len(parts) == 1 else None
    plain = isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))
    return name if plain else None


def _characters(value: Any) -> int:
    return max(map(len, _texts(value)), default=0)


def _is_said(value: Any, data: Mapping[str, Any], used: Sequence[str], role: str) -> bool:
    """Whether a value stands in what is read anyway, or spells all of it once more."""
    beside = [n for n in used if isinstance(data[n], list) or (role_of(n) in _ANSWERS) == (role in _ANSWERS)]
    if isinstance(value, str) and len(value) >= _PLAIN:  # mostly, and a tenth of the time
        stripped = value.strip()
        if any(stripped in text for name in beside for text in _texts(data[name])):
            return True
    own = _folded(value)
    read = {name: _folded(data[name]) for name in used}
    fitting = " ".join(read[name] for name in beside)
    if own and re.search(rf"(?<!\w){re.escape(own)}(?!\w)", fitting):
        return True
    if not isinstance(value, str):
        parts = [folded for text in _texts(value) if (folded := _folded(text))]
        return bool(parts) and all(re.search(rf"(?<!\w){re.escape(part)}(?!\w)", fitting) for part in parts)
    said = [text for text in read.values() if text]
    return role not in _ANSWERS and len(said) > 1 and all(text in own for text in said)


def _folded(value: Any) -> str:
    return " ".join(" ".join(_texts(value)).split())
