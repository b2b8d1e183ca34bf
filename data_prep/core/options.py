"""From a composed configuration to checked dataclasses: one line per mistake, with the nearest valid name."""

from __future__ import annotations

import dataclasses
import keyword
import math
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from types import MappingProxyType
from typing import Any, TypeVar, Union, get_args, get_origin

from data_prep.core.errors import UserError, nearest

T = TypeVar("T")
_WIDEST = 2**63
"""Whole numbers are below it: the libraries that they go to hold no wider ones."""

_EXPECTED = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "text",
    list: "a list [a,b]",
    dict: "a mapping {key: value}",
}


def build(cls: type[T], values: Any, where: str) -> T:
    """An instance of the dataclass `cls` from plain `values` (a dict without interpolations).

    Args:
        cls: a dataclass whose fields are options; nested dataclasses are built too.
        values: option name -> value; missing options take their default.
        where: dotted path of the options, for errors: `stages.sft`.

    Raises:
        UserError: an unknown option (the nearest is offered), or a value of the wrong type.
    """
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"expected {_EXPECTED[dict]} (got {shown(values)})", field=where, code="bad_value")
    hints = option_types(cls)
    checked: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        name = f"{key}_" if keyword.iskeyword(str(key)) else str(key)
        if name not in hints:
            raise unknown_key(path, hints)
        checked[name] = convert(hints[name], value, path)
    for each in dataclasses.fields(cls):  # type: ignore[arg-type]
        bounds, value = each.metadata.get("bounds"), checked.get(each.name)
        if bounds is not None and isinstance(value, int | float) and (problem := bounds.problem(value)):
            path = f"{where}.{each.name}" if where else each.name
            raise UserError(f"out of range (got {shown(value)}; {problem})", field=path, code="bad_value")
    try:
        return cls(**checked)
    except ValueError as error:
        raise UserError(str(error), field=where or None, code="bad_value") from error


def option_types(cls: type) -> Mapping[str, Any]:
    """The options of a dataclass: field name -> resolved annotation (class variables left out)."""
    return _option_types(cls)


@cache
def _option_types(cls: type) -> Mapping[str, Any]:
    hints = typing.get_type_hints(cls)
    return MappingProxyType({item.name: hints[item.name] for item in dataclasses.fields(cls) if item.init})


def unknown_key(path: str, choices: typing.Iterable[str]) -> UserError:
    """The error for an option that does not exist; `path` is its full dotted path."""
    pool = sorted(choices)
    parent, _, key = path.rpartition(".")
    near = nearest(key, pool)
    if near:
        guess = f"did you mean '{parent}.{near}'?" if parent else f"did you mean '{near}'?"
        return UserError(f"unknown option ({guess})", field=path, code="unknown_key")
    return UserError(f"unknown option (choices: {', '.join(pool) or 'none'})", field=path, code="unknown_key")


def convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotation `kind` wants it; raises UserError with the option's path `where`."""
    origin = get_origin(kind)
    if kind is Any:
        return value
    if origin is Union or origin is types.UnionType:
        inner = [part for part in get_args(kind) if part is not type(None)]
        return None if value is None else convert(inner[0], value, where)
    if value is None:
        raise UserError("needs a value (got null)", field=where, code="bad_value")
    if dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, where)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _choice(kind, value, where)
    if origin in (list, dict):
        return _container(kind, value, where)
    return _scalar(kind, value, where)


def _choice(kind: type[Enum], value: Any, where: str) -> Enum:
    """A member of an enumeration, by its name."""
    if isinstance(value, kind):
        return value
    word = value.name if isinstance(value, Enum) else str(value).lower() if isinstance(value, bool) else str(value)
    if word in kind.__members__:
        return kind.__members__[word]
    near = nearest(word, kind.__members__)
    guess = f"did you mean '{near}'? " if near else ""
    listed = ", ".join(kind.__members__)
    raise UserError(f"unknown choice '{word}' ({guess}choices: {listed})", field=where, code="bad_value")


def _container(kind: Any, value: Any, where: str) -> Any:
    """A list or a mapping, with its elements checked."""
    origin, parts = get_origin(kind), get_args(kind)
    if not isinstance(value, origin):
        raise UserError(f"expected {_EXPECTED[origin]} (got {shown(value)})", field=where, code="bad_value")
    if origin is list:
        return [convert(parts[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    return {str(key): convert(parts[1], item, f"{where}.{key}") for key, item in value.items()}


def _scalar(kind: type, value: Any, where: str) -> Any:
    """A number, a truth value or a text; nothing is rounded and no text is read as a truth value."""
    good: Any = None
    if kind is bool:
        good = value if isinstance(value, bool) else None
    elif kind is int:
        good = value if isinstance(value, int) and not isinstance(value, bool) else None
        if isinstance(value, float) and value.is_integer():
            good = int(value)
        if good is not None and not -_WIDEST <= good < _WIDEST:
            raise UserError(
                f"out of range (got {shown(value)}; expected a whole number of 64 bits)", field=where, code="bad_value"
            )
    elif kind is float:
        good = _number(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else None
    elif kind is str:
        good = str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None
    else:
        raise TypeError(f"{where}: options of type {kind} are not supported")
    if good is None:
        raise UserError(f"expected {_EXPECTED[kind]} (got {shown(value)})", field=where, code="bad_value")
    return good


def _number(value: int | float | str) -> float | None:
    """YAML reads `1e-3` as text; it is a number all the same. A whole number may be larger than any other."""
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number


def shown(value: Any) -> str:
    """A value as an error message shows it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str) else str(value)


def plain(value: Any) -> Any:
    """Dataclasses, enumerations and tuples as what JSON and YAML can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


@dataclass(frozen=True)
class Bounds:
    """The interval of a number; `above` and `below` are ends that it must not reach.

    Numbers are finite, unless `high=math.inf` says that an infinite one means no limit.
    """

    low: float = 0.0
    high: float = sys.float_info.max
    above: float | None = None
    below: float | None = None

    def problem(self, value: float) -> str | None:
        """What is wrong with a value, as the end of a sentence, or None."""
        low = value > self.above if self.above is not None else value >= self.low
        high = value < self.below if self.below is not None else value <= self.high
        if low and high and not math.isnan(value):
            return None
        endless = self.below is None and self.high == sys.float_info.max
        return "expected a finite number" if low and endless else f"expected {self}"

    def __str__(self) -> str:
        low = f"more than {self.above:g}" if self.above is not None else f"at least {self.low:g}"
        if self.below is not None:
            return f"{low} and less than {self.below:g}"
        return low if self.high >= sys.float_info.max else f"{low} and at most {self.high:g}"


def option(default: Any, help: str, **bounds: float) -> Any:
    """A dataclass field with a default and its help string; numbers are at least 0 unless `bounds` say otherwise."""
    is_number = isinstance(default, int | float) and not isinstance(default, bool)
    metadata: dict[str, Any] = {"help": help}
    if is_number or bounds:
        metadata["bounds"] = Bounds(**bounds)
    return field(default=default, metadata=metadata)


def mapping(help: str) -> Any:
    """A dataclass field that holds a mapping, empty by default."""
    return field(default_factory=dict, metadata={"help": help})


def listing(help: str) -> Any:
    """A dataclass field that holds a list, empty by default."""
    return field(default_factory=list, metadata={"help": help})
