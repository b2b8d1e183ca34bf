"""Which format rows are of, from their columns and first values, and what to say where none or several fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_prep.core.errors import UserError, nearest
from data_prep.formats.base import FORMATS, Format
from data_prep.formats.column_roles import ANSWER, BETTER, OTHER, QUESTION, WORSE, role_of
from data_prep.sources.rows import short
from data_prep.types import CONVERSATION, DOCUMENT, PREFERENCE, PROMPT, RowKind

_LISTED = 20
"""Columns that an error names."""
_SETTLED = (CONVERSATION, PREFERENCE)
"""Whose format prompts follow where several fit: the stages before PPO have read the same rows."""
_META = ("split", "task", "features")
"""Columns that every format reads."""
_ALIKE = 0.82
"""How like a known name a column must be to be taken for it misspelt: `turns` are no `ranks`."""
_NAME_THEM = "set format, or name the columns with columns={ours: theirs}"


def detect_format(
    keys: Iterable[str],
    kind: RowKind,
    file: str | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
    options: Mapping[str, Any] | None = None,
) -> tuple[type[Format], str]:
    """The format whose rows have these keys and yield `kind`, and the evidence for the data card.

    A format that reads all columns of another, and more, goes before it; whole dialogues go before their parts.
    Prompts are read as the format that dialogues of these rows would be, else as that of their preferences.

    Args:
        keys: the columns.
        kind: the kind of record asked for.
        file: for errors.
        rows: the first rows, where there are any; their values may speak against a format.
        options: the options of the format.

    Raises:
        UserError: none or several fit; says what was seen.
    """
    seen = frozenset(keys)
    used = {name: form.uses(seen) for name, form in FORMATS.items() if not form.by_name}
    doubts = {name: FORMATS.get(name).doubt(rows, kind, options or {}) for name, own in used.items() if own}
    used = {name: own for name, own in used.items() if own and doubts[name] is None}
    fitting = [name for name, own in used.items() if not any(own < other for other in used.values())]
    useful = [name for name in fitting if kind in FORMATS.get(name).kinds]
    useful = useful or [name for name in fitting if FORMATS.get(name).yields(kind)]
    if kind == CONVERSATION:
        useful = _whole(useful)
    elif kind == PROMPT and len(useful) > 1:
        useful = _as_settled(fitting) or useful
    if len(useful) == 1:
        rest = seen - used[useful[0]] - {"split", "task"}  # which every format reads
        return FORMATS.get(useful[0]), f"columns {listed(used[useful[0]])}" + (f"; unused {listed(rest)}" * bool(rest))
    if useful:
        names = "; ".join(f"{name} (columns {listed(used[name])})" for name in useful)
        raise UserError(
            f"the columns {listed(seen)} fit several formats: {names}",
            code="format",
            hint=f"set format to one of them: {', '.join(useful)} (of a recipe: data.{kind.option}.format), "
            "or leave columns out with data.unused=[...]",
            file=file,
        )
    for doubt in doubts.values():
        if doubt is not None and doubt.hint:
            raise UserError(doubt.message, code=doubt.code, hint=doubt.hint, file=file, field=doubt.field)
    if fitting:
        form = FORMATS.get(fitting[0])
        raise UserError(
            f"rows with the columns {listed(seen)} are of the format {form.name}, which yields "
            f"{' and '.join(form.kinds)} rows (expected {kind} rows)",
            code="format_kind",
            hint=_instead(seen - used[fitting[0]], form, kind, rows[0] if rows else {}),
            file=file,
        )
    raise _no_format(seen, kind, file, rows)


def _whole(useful: list[str]) -> list[str]:
    """Of several formats the one whose rows hold whole dialogues: what stands beside them is looked at later."""
    whole = [name for name in useful if FORMATS.get(name).whole]
    return whole if len(whole) == 1 else useful


def _as_settled(fitting: Sequence[str]) -> list[str]:
    """The one format that reads the rows for the stages before PPO, if there is one."""
    for kind in _SETTLED:
        own = _whole([name for name in fitting if kind in FORMATS.get(name).kinds])
        if own:
            return own if len(own) == 1 else []
    return []


def _instead(rest: frozenset[str], form: type[Format], kind: RowKind, first: Mapping[str, Any]) -> str:
    """What to do with rows of a format that does not yield the kind asked for; `rest` are the columns it leaves.

    Of a column of the first row that holds several answers, as a list or as text that spells one, none is advised.
    """
    rest = frozenset(name for name in rest if not isinstance(first.get(name), list | dict))
    rest = frozenset(name for name in rest if not str(first.get(name)).startswith("["))
    if form.kinds == (PROMPT,) and kind == PREFERENCE:
        better = next((name for name in sorted(rest) if role_of(name) == BETTER), "BETTER")
        worse = next((name for name in sorted(rest) if role_of(name) == WORSE), "WORSE")
        return f"name both replies: columns={{chosen: {better}, rejected: {worse}}}"
    if form.kinds == (DOCUMENT,):
        return (
            "plain text trains with pipeline=pretrain; where it holds a question and its answer, "
            "parse={text: 'Q: {prompt} A: {completion}'} takes it apart"
        )
    if form.kinds == (PROMPT,) and kind == CONVERSATION:
        answer = next((name for name in sorted(rest) if role_of(name) in (ANSWER, BETTER)), "COLUMN")
        table = ", or set format=answer_table where every other column is an answer" if len(rest) >= 2 else ""
        return f"name the column of the answer: columns={{completion: {answer}}}{table}"
    if PREFERENCE in form.kinds and kind == CONVERSATION and rest.isdisjoint({"completion"}):
        chosen = getattr(form, "sides", ("",))[0]
        if chosen and form.whole:
            return f"to imitate the better dialogues, name them: columns={{messages: {chosen}}}"
        if chosen:
            return f"to imitate the better replies, name them as answers: columns={{completion: {chosen}}}"
    if kind == PREFERENCE:
        return f"two replies to one prompt are needed: {{prompt, chosen, rejected}}; {_NAME_THEM}"
    return _NAME_THEM


def listed(names: Iterable[str]) -> str:
    """The names in order; of very many, or very long ones, the first."""
    shown = [short(name) or "(without a name)" for name in sorted(names)]
    more = f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    return ", ".join(shown[:_LISTED]) + more or "none"


def _no_format(seen: frozenset[str], kind: RowKind, file: str | None, rows: Sequence[Mapping[str, Any]]) -> UserError:
    """The error for keys that no format knows, with the nearest known column."""
    known = sorted({c for _, form in FORMATS.items() for columns in (*form.spellings, form.extras) for c in columns})
    unknown = [key for key in sorted(seen)[:_LISTED] if key not in (*known, *_META) and role_of(key) is not None]
    near = {key: nearest(key, known, _ALIKE) for key in unknown}
    guesses = ", ".join(f"'{guess}' for '{key}'" for key, guess in near.items() if guess and guess not in seen)
    guess = f"did you mean the column {guesses}? " if guesses else ""
    return UserError(
        f"no format knows rows with the columns {listed(seen)} ({guess}formats: {', '.join(FORMATS.names())})",
        code="unknown_format",
        hint=_turns_of(rows) or _in_capitals(seen, kind) or _by_role(kind, rows) or _NAME_THEM,
        file=file,
    )


def _in_capitals(seen: frozenset[str], kind: RowKind) -> str | None:
    """What to do with columns that a format knows in small letters."""
    plain = {name.strip().lower(): name for name in seen}
    if plain.keys() == seen:
        return None
    try:
        form, _ = detect_format(plain, kind)
    except UserError:
        return None
    named = [f"{name}: {plain[name]}" for name in sorted(form.uses(frozenset(plain))) if plain[name] != name]
    return f"name the columns: columns={{{', '.join(named)}}}"


def _turns_of(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """What to do with rows of which one column holds the turns of a dialogue, by another name."""
    for name, value in rows[0].items() if rows else ():
        turns = value if isinstance(value, list) else []
        objects = role_of(str(name)) == OTHER and all(isinstance(one, dict) and _says(one) for one in turns)
        if len(turns) > 1 and (objects or role_of(str(name)) == QUESTION):
            return f"name the column of the turns: columns={{messages: {name}}}"
    return None


def _says(turn: Mapping[str, Any]) -> bool:
    """Whether an object can be a turn: a text beside what says whose it is."""
    return len(turn) > 1 and any(isinstance(value, str) for value in turn.values())


def _by_role(kind: RowKind, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """How to name a question and an answer, of which the columns' names tell one at least."""
    texts = sorted(str(name) for name, value in (rows[0].items() if rows else ()) if isinstance(value, str))
    roles = {role_of(name): name for name in reversed(texts)}
    asked, said = roles.get(QUESTION), roles.get(ANSWER)
    if kind != CONVERSATION or not (asked or said):
        return None
    return f"name the columns: columns={{prompt: {asked or 'COLUMN'}, completion: {said or 'COLUMN'}}}"
