"""The documents as data: their blocks, code spans, links and the `align` commands in them.

Placeholders: a word in capitals (RUN, FOLDER, BASE, ...) stands for something of the reader's and is left as it is,
except where a choice of the project's must stand: NAME after `adapter=`, `data=`, `model=`, `pipeline=`, `experiment=`
and in `stages.NAME` becomes a choice that exists. A word in square brackets is usage, not part of the command.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHOICES = {
    "adapter=NAME": "adapter=lora",
    "data=NAME": "data=smalltalk",
    "model=NAME": "model=nano",
    "pipeline=NAME": "pipeline=rlhf",
    "experiment=NAME": "experiment=nano_pretrain",
    "stages.NAME.": "stages.sft.",
}
_FENCE = re.compile(r"^```(\w*)\s*$")
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Page:
    """One document."""

    path: Path

    @property
    def shown(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Command:
    """An `align` command as it stands in a document."""

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        """The words after `align`, placeholders for choices filled in."""
        text = self.text
        for name, choice in CHOICES.items():
            text = text.replace(name, choice)
        return [word for word in shlex.split(text, comments=True)[1:] if not word.startswith("[")]


@cache
def pages() -> tuple[Page, ...]:
    """README, CHANGELOG, CONTRIBUTING and everything in docs/."""
    tops = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
    return tuple(Page(path) for path in [*tops, *sorted((ROOT / "docs").glob("*.md"))])


def blocks(page: Page) -> Iterator[tuple[str, str]]:
    """(language, text) of the fenced blocks."""
    language, lines = None, list[str]()
    for line in page.text.splitlines():
        fence = _FENCE.match(line)
        if fence and language is None:
            language, lines = fence[1], []
        elif fence:
            yield str(language), "\n".join(lines)
            language = None
        elif language is not None:
            lines.append(line)
    assert language is None, f"{page.shown}: a fenced block is not closed"


def prose(page: Page) -> str:
    """The text outside fenced blocks."""
    kept, inside = [], False
    for line in page.text.splitlines():
        if _FENCE.match(line):
            inside = not inside
        elif not inside:
            kept.append(line)
    return "\n".join(kept)


def spans(page: Page) -> list[str]:
    """The code spans outside fenced blocks; `\\|` of tables is read as `|`."""
    return [span.replace("\\|", "|") for span in _SPAN.findall(prose(page))]


def links(page: Page) -> list[str]:
    """Targets of the links outside fenced blocks."""
    return _LINK.findall(prose(page))


def shell_lines(page: Page) -> list[str]:
    """Lines of the shell blocks, continued lines joined."""
    found: list[str] = []
    for language, text in blocks(page):
        if language in ("bash", "sh", "shell", "console"):
            found += [line.strip().removeprefix("$ ") for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in found if line and not line.startswith("#")]


def commands() -> list[Command]:
    """Every `align ...` line of a shell block and every code span that starts with `align `, each once a page."""
    found: dict[Command, None] = {}
    for page in pages():
        for line in [*shell_lines(page), *spans(page)]:
            if line.startswith("align "):
                found[Command(page.shown, line)] = None
    return list(found)


def anchors(page: Page) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
