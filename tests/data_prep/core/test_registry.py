"""Names to classes, and the one-line errors."""

from __future__ import annotations

from typing import Any

import pytest

from data_prep.core import registry
from data_prep.core.errors import TrainingStopped, UserError, at_row, nearest, unknown
from data_prep.core.registry import Registry


def test_register_and_get() -> None:
    things: Registry[Any] = Registry("thing", None)

    @things.register("one")
    class One:
        name: str

    assert things.get("one") is One and One.name == "one"
    assert things.names() == ["one"] and things.items() == [("one", One)]
    with pytest.raises(UserError, match=r"unknown thing 'on' \(did you mean 'one'\? choices: one\)"):
        things.get("on")


def test_a_name_is_given_once() -> None:
    things: Registry[Any] = Registry("thing", None)

    def first() -> None: ...

    def second() -> None: ...

    things.register("one")(first)
    things.register("one")(first)
    with pytest.raises(ValueError, match="registered twice"):
        things.register("one")(second)


def test_the_package_is_imported_on_first_use() -> None:
    formats: Registry[Any] = Registry("format", "data_prep.formats")
    assert formats.names() == []  # its modules register with the registry of the package itself
    from data_prep.formats import FORMATS

    assert {"alpaca", "answer_table", "hh", "messages", "pairs", "prompt_completion", "sharegpt", "text"} <= set(
        FORMATS.names()
    )


class Point:
    """An entry point that fails or does nothing."""

    name, value = "mine", "mine.module"

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def load(self) -> None:
        if self.fails:
            raise ImportError("no module\nnamed mine")


def test_plugins_are_loaded_once_and_failures_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._plugins, "loaded", False)
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: [Point(True)])
    things: Registry[Any] = Registry("thing", None)
    with pytest.raises(UserError, match=r"plug-in 'mine' .mine.module. cannot be imported: no module named mine"):
        things.names()
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: [Point(False)])
    assert things.names() == []


def test_errors_are_one_line() -> None:
    error = UserError("bad\nthing", code="c", hint="do\nthis", file="f", row=2, field="x")
    assert str(error) == "f:2:x: bad thing; do this" and error.exit_code == 2
    assert error.as_dict() == {
        "code": "c",
        "message": "bad thing",
        "hint": "do this",
        "file": "f",
        "row": 2,
        "field": "x",
    }
    assert str(UserError("m")) == "m" and UserError("m").code == "user_error"
    assert str(UserError("m", file="f")) == "f: m"
    assert TrainingStopped("nan").exit_code == 3


def test_at_row() -> None:
    assert str(at_row("a:b.jsonl:12#part0", UserError("m", field="x"))) == "a:b.jsonl:12:x: m"
    named = UserError("m", file="g", row=1)
    assert at_row("f:2", named) is named


def test_nearest_and_unknown() -> None:
    assert nearest("LoRA", ["lora", "vera"]) == "lora" and nearest("zzz", ["lora"]) is None
    assert (
        str(unknown("adapter", "lorra", ["lora", "full"]))
        == "unknown adapter 'lorra' (did you mean 'lora'? choices: full, lora)"
    )
    assert "choices: none" in str(unknown("adapter", "x", []))
