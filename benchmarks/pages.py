"""The measured parts of the documents: between `<!-- measured: NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def names_in(page: Path) -> list[str]:
    """The names of a page's measured parts."""
    return re.findall(r"<!-- measured: (.+?) -->", page.read_text(encoding="utf-8"))


def write_measured(page: Path, name: str, part: str) -> None:
    """Replace a measured part of a page; the program ends where the page has none of this name."""
    text, found = re.subn(
        rf"(<!-- measured: {name} -->\n).*?(<!-- end -->)",
        lambda match: match[1] + part + match[2],
        page.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    if not found:
        sys.exit(f"docs/{page.name} has no part '<!-- measured: {name} -->': put one where it belongs")
    page.write_text(text, encoding="utf-8")
