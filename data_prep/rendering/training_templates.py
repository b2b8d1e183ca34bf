"""The training forms of chat templates that ship with TRL, found where TRL is installed; nothing of it is imported."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

_FORM = "_training.jinja"


@cache
def folder() -> Path | None:
    """The folder of TRL's chat templates, if TRL is installed."""
    found = find_spec("trl")
    place = Path(found.origin).parent / "chat_templates" if found and found.origin else None
    return place if place and place.is_dir() else None


def training_twin(source: str) -> Path | None:
    """The file of the form that is made for training of a template with this text, if TRL has another one."""
    place = folder()
    for file in sorted(place.glob("*.jinja")) if place else ():
        twin = file.with_name(file.stem + _FORM)
        if twin.exists() and _plain(file.read_text(encoding="utf-8")) == _plain(source):
            return twin
    return None


def _plain(text: str) -> str:
    return text.replace("\r\n", "\n").strip()
